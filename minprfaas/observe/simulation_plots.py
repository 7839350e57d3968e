"""Pictures of a simulation over time, and of a trace's cache hits over capacity. Chapters 06, 12 and 13."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from minprfaas.observe.plots import new_figure, save_figure
from minprfaas.simulator.recorder import Report, Tick

POINTS = 200  # a curve is drawn through so many means


def draw_simulation(directory: str | Path, report: Report) -> list[Path]:
    """Write simulation_{queue,link,policy}.png into `directory` and return their paths. Raises UserError."""
    size = max(1, len(report.series) // POINTS)
    buckets = (report.series[start:start + size] for start in range(0, len(report.series), size))
    over = Tick(*zip(*([fmean(column) for column in zip(*bucket)] for bucket in buckets)))
    busy = {"PrfaaS": over.prfaas_busy, "PD-P": over.pdp_busy, "PD-D": over.pdd_busy}
    curves = {
        "queue": ("requests", {"without a first token": over.waiting}, "busy", busy),
        "link": ("Gbps", {"egress": over.egress_gbps}, "GB", {"queued": [count / 1e9 for count in over.queued_bytes]}),
        "policy": ("tokens", {"threshold t": over.threshold}, "nodes", {"N_p": over.n_p}),
    }
    return [_draw(directory, name, over.at_s, *about) for name, about in curves.items()]


def _draw(directory: str | Path, name: str, at_s: Sequence[float], left_unit: str, left: dict[str, Sequence[float]],
          right_unit: str, right: dict[str, Sequence[float]]) -> Path:
    figure, axes = new_figure(8.0, 3.2)
    other = axes.twinx()
    for label, values in left.items():
        axes.plot(at_s, values, label=label, color="black", linewidth=1)
    for number, (label, values) in enumerate(right.items()):
        other.plot(at_s, values, label=label, color=f"C{number}", linewidth=1, alpha=0.8)
    axes.set(xlabel="simulated seconds", ylabel=left_unit, title=f"{name}, simulated", ylim=(0, None))
    other.set(ylabel=right_unit, ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return save_figure(figure, directory, f"simulation_{name}.png")


def draw_hit_ratios(directory: str | Path, replays: Mapping[str, Sequence]) -> Path:
    """Write hit_ratio.png: for each kind of model the hit ratio of its `minprfaas.kvcache.replay` rows over their
    capacity. Raises UserError."""
    figure, axes = new_figure()
    for number, (name, rows) in enumerate(replays.items()):
        limited = [(row.capacity_blocks, row.hit_ratio) for row in rows if row.capacity_blocks is not None]
        axes.plot(*zip(*limited), marker="o", color=f"C{number}", label=name)
        for row in rows:
            if row.capacity_blocks is None:
                axes.axhline(row.hit_ratio, linestyle=":", color=f"C{number}")
    axes.set(xscale="log", xlabel="capacity, blocks", ylabel="share of blocks found",
             title="Prefix-cache hits (dotted: a pool without limit)")
    axes.legend(frameon=False)
    return save_figure(figure, directory, "hit_ratio.png")
