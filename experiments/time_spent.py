"""Where a round's time goes, by system and length of context: `+experiment=efficiency`."""

import plotting

RECORDS = "efficiency"

PHASES = {"draft": "#0072b2", "plan": "#e69f00", "verify": "#009e73", "evict": "#cc79a7"}


def main() -> None:
    records = sorted(plotting.records(RECORDS).records.values(), key=lambda record: record["prompt_tokens"])
    made, panels = plotting.canvas(len(records), width=3.6)
    for axes, record in zip(panels, records, strict=True):
        systems = [system for system in record["systems"] if system.get("phase_cpu_ms")]
        left = [0.0] * len(systems)
        for phase, color in PHASES.items():
            widths = [s["phase_cpu_ms"].get(phase, 0.0) / s["acceptance_length"] for s in systems]
            axes.barh([s["name"] for s in systems], widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="CPU ms per token", title=f"{record['prompt_tokens']:,} prompt tokens")
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    first = records[0]
    setting = f"{first['dtype']} ({first['linear']})", f"kv_budget {first['kv_budget']}"
    plotting.title(made, first["model"], *setting)
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
