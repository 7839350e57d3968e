"""Links between datacenters: lanes, frames, an emulated line, recovery, trust. Chapters 07, 08, 14; paper 3.3."""
