"""Pictures of a plan: the paper's figures 2, 5(a) and 5(b), for its fleet or another. Chapters 00, 10 and 13."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from minprfaas.errors import UserError
from minprfaas.files import OutputFile, make_folder, written_whole
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import Fleet, Plan, sweep

if TYPE_CHECKING:  # an extra that need not be installed
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_LENGTHS = 0.89  # figure 5(b) ends at this quantile of the lengths: 60K in the paper's case
THRESHOLDS = 120


def prepare_plots(directory: str | Path) -> None:
    """Make the directory, and see that something can be drawn into it, before the work whose result is to be drawn.
    Raises UserError naming the extra when matplotlib is missing, or what is wrong with the directory."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("--plots needs matplotlib, which is not installed; python -m pip install matplotlib") from None
    make_folder(directory)
    OutputFile(Path(directory) / "plots").close()


def new_figure(width: float = 6.4, height: float = 4.0) -> tuple["Figure", "Axes"]:
    """An empty matplotlib figure and its axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: "Figure", directory: str | Path, name: str) -> Path:
    """Write `directory/name`, whole or not at all. Raises UserError when it cannot."""
    path = Path(directory) / name
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:])
    return path


def draw_curves(directory: str | Path, name: str, curves: Mapping[str, Sequence[tuple[float, float]]], y_label: str,
                title: str = "") -> Path:
    """Write `directory/name`: curves over tokens, by model or kind of layer, those of dense models dashed. Returns its
    path; raises UserError."""
    figure, axes = new_figure()
    for label, points in curves.items():
        axes.plot(*zip(*points), marker=".", label=label, linestyle="--" if label.endswith("(dense)") else "-")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    _add_legend(figure)
    return save_figure(figure, directory, name)


def _add_legend(figure: "Figure") -> None:
    """Below the axes, where it covers no curve."""
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")


def draw_plan(directory: str | Path, fleet: Fleet, lengths: LengthDistribution, plan: Plan,
              kv_gbps: Mapping[str, Sequence[tuple[int, float]]]) -> list[Path]:
    """Write figure_2.png, figure_5a.png and figure_5b.png into `directory` and return their paths. `kv_gbps`: by name,
    the (tokens, Gbps per instance) of figure 2. Raises UserError."""
    figure_2 = draw_curves(directory, "figure_2.png", kv_gbps, "KV throughput of an instance, Gbps",
                           "Figure 2: KV throughput (eq. 1) at the published or measured lengths")
    return [figure_2, *draw_sweeps(directory, fleet, lengths, plan)]


def draw_sweeps(directory: str | Path, fleet: Fleet, lengths: LengthDistribution, plan: Plan,
                measured: Sequence[tuple[Plan, float]] = ()) -> list[Path]:
    """Write figure_5a.png and figure_5b.png into `directory` and return their paths; onto the modelled lines come what
    was `measured`: of a plan, requests/s. Raises UserError."""
    last = lengths.quantile(SHOWN_LENGTHS)
    thresholds = [last * i / THRESHOLDS for i in range(THRESHOLDS + 1)]
    splits = range(fleet.pd_instances)
    at = "nothing offloaded" if plan.threshold == inf else f"t = {plan.threshold:,.0f} tokens"
    by_split = _draw_bounds(sweep(fleet, lengths, [plan.threshold], splits), splits, plan.n_p,
                            "PD prefill instances N_p", f"Figure 5(a), modelled: {at}",
                            [(of.n_p, rps) for of, rps in measured if of.threshold == plan.threshold])
    by_threshold = _draw_bounds(sweep(fleet, lengths, thresholds, [plan.n_p]), thresholds, plan.threshold,
                                "threshold t, tokens", f"Figure 5(b), modelled: N_p = {plan.n_p}, N_d = {plan.n_d}",
                                [(of.threshold, rps) for of, rps in measured if of.n_p == plan.n_p])
    return [save_figure(by_split, directory, "figure_5a.png"), save_figure(by_threshold, directory, "figure_5b.png")]


def _draw_bounds(plans: Sequence[Plan], x: Sequence[float], best: float, x_label: str, title: str,
                 measured: Sequence[tuple[float, float]]) -> "Figure":
    """What each stage allows the system, the system itself, the planned point, and what was measured of others."""
    figure, axes = new_figure()
    stages = {"PrfaaS: Θ_prfaas / p": ("prfaas compute", "prfaas egress"), "PD-P: Θ_pdp / (1 - p)": ("pdp",),
              "PD-D: Θ_pdd": ("pdd",)}
    for label, names in stages.items():
        axes.plot(x, [min(plan.bounds[name] for name in names) for plan in plans], linestyle="--", label=label)
    system = [plan.lambda_max for plan in plans]
    axes.plot(x, system, color="black", linewidth=2, label="system: Λ_max")
    if best != inf:
        axes.axvline(best, color="grey", linestyle=":")
    if measured:
        axes.plot(*zip(*measured), "o", color="crimson", label="measured (emulated machines)", zorder=3)
    axes.set(xlabel=x_label, ylabel="requests / s", ylim=(0, 2 * max(system) or 1), title=title)
    _add_legend(figure)
    axes.grid(alpha=0.3)
    return figure
