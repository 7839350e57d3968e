"""How KV and messages move between nodes: `loopback` within a process, `fabric` within a datacenter, `wan` between
datacenters. Chapters 07, 08, 09."""
