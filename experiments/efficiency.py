"""Decoding speed beside transformers' own, a panel per length of context; prints the table: `+experiment=efficiency`.

Records of other runs of task=throughput serve too: of one long prompt, of many, of batches.
"""

from collections.abc import Sequence

import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RECORDS = "efficiency"
SPEED = "tokens_per_cpu_second"  # other processes hardly disturb it
BASES = ("transformers", "full")


def repeated(record: dict) -> str:
    """Over what the medians are."""
    batches = record["num_prompts"] // record["batch_size"]
    return f"{batches} prompts" if batches > 1 else f"{record['systems'][0]['repeats']:g} repeats"


def print_table(record: dict) -> None:
    """Per CPU second, and by the wall clock with the ratios to others' speed."""
    bases = [base for base in BASES if f"ratio_to_{base}" in record["systems"][0]]
    print(f"\n{record['prompt_tokens']:,g} tokens, batch of {record['batch_size']}, {repeated(record)}\n")
    print("| system | per CPU second | tokens/s [least, most] |" + "".join(f" / {base} |" for base in bases))
    print("|---|" + "---|" * (2 + len(bases)))
    for s in record["systems"]:
        range_ = f"[{s['tokens_per_second_min']:.2f}, {s['tokens_per_second_max']:.2f}]"
        ratios = "".join(f" {s[f'ratio_to_{base}']:.2f} |" for base in bases)
        print(f"| `{s['name']}` | {s[SPEED]:.2f} | {s['tokens_per_second']:.2f} {range_} |{ratios}")


def setting(record: dict) -> list[str]:
    """Of the title."""
    together = [f"{record['batch_size']} prompts at once"] if record["batch_size"] > 1 else []
    tokens = record["systems"][0]["new_tokens"] / record["batch_size"]
    parts = [record["model"], f"{record['dtype']} ({record['linear']})", f"kv_budget {record['kv_budget']}", *together]
    return [*parts, f"median and range of {repeated(record)}, {tokens:g} tokens each"]


def canvas(records: list[dict], above: float) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each record, a bar for each system, whose names stand on the left. above: inches beside the bars."""
    width = 4.4 if len(records) > 1 else 7.5  # a single one has to hold the title
    made, panels = plotting.canvas(len(records), width=width, height=above + 0.26 * len(records[0]["systems"]))
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    return made, panels


def draw(axes: Axes, record: dict) -> None:
    systems = record["systems"]
    error = plotting.spread(systems, SPEED, f"{SPEED}_min", f"{SPEED}_max")
    looks = [plotting.look(system["name"].partition("+")[0].partition(":")[0]) for system in systems]
    bars = axes.barh([s["name"] for s in systems], [s[SPEED] for s in systems], xerr=error, capsize=2)
    for bar, style, system in zip(bars, looks, systems, strict=True):
        bar.set(color=style["color"], alpha=1 if "+" in system["name"] else 0.6)
    axes.set(xlabel="tokens per CPU second", title=f"{record['prompt_tokens']:,g} prompt tokens")
    axes.invert_yaxis()


def main() -> None:
    records = sorted(plotting.records(RECORDS).records.values(), key=lambda record: record["prompt_tokens"])
    made, panels = canvas(records, above=1.2)
    for axes, record in zip(panels, records, strict=True):
        print_table(record)
        draw(axes, record)
    plotting.title(made, *setting(records[0]))
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
