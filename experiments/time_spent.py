"""Where a round's time goes, by system and length of context: `+experiment=efficiency`."""

import plotting
from efficiency import SPEED, canvas, setting
from matplotlib.axes import Axes

RECORDS = "efficiency"

PHASES = {"draft": "#0072b2", "plan": "#e69f00", "verify": "#009e73", "evict": "#cc79a7"}


def share(phases: dict[str, float], phase: str) -> float:
    return phases.get(phase, 0.0) / sum(phases.values())


def draw(axes: Axes, record: dict) -> None:
    """Bars are as long as the repeats' median; phases have their shares in the last one, of prompts in the medians."""
    systems = [system for system in record["systems"] if system.get("phase_cpu_ms")]
    names, left = [system["name"] for system in systems], [0.0] * len(systems)
    ms = [{end: 1e3 / system[f"{SPEED}{end}"] for end in ("", "_min", "_max")} for system in systems]
    for phase, color in PHASES.items():
        widths = [times[""] * share(system["phase_cpu_ms"], phase) for times, system in zip(ms, systems, strict=True)]
        axes.barh(names, widths, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    error = plotting.spread(ms, "", "_max", "_min")
    axes.errorbar(left, names, xerr=error, fmt="none", ecolor="black", capsize=3, label="range of the whole")
    axes.invert_yaxis()
    axes.set(xlabel="CPU ms per token", title=f"{record['prompt_tokens']:,g} prompt tokens")


def main() -> None:
    records = sorted(plotting.records(RECORDS).records.values(), key=lambda record: record["prompt_tokens"])
    made, panels = canvas(records, above=1.4)
    for axes, record in zip(panels, records, strict=True):
        draw(axes, record)
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    plotting.title(made, *setting(records[0]))
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
