"""Decoding speed beside transformers' own, by length of context; prints the table: `+experiment=efficiency`."""

import plotting

RECORDS = "efficiency"
SPEED = "tokens_per_cpu_second"  # other processes hardly disturb it


def main() -> None:
    records = sorted(plotting.records(RECORDS).records.values(), key=lambda record: record["prompt_tokens"])
    lengths = [record["prompt_tokens"] for record in records]
    made, (axes,) = plotting.canvas(width=6.4, height=4)
    print("| system |" + "".join(f" {length:,} |" for length in lengths) + "\n|---|" + "---|" * len(lengths))
    for index, name in enumerate(system["name"] for system in records[0]["systems"]):
        own = [next(s for s in record["systems"] if s["name"] == name) for record in records]
        y = [s[SPEED] for s in own]
        policy, _, drafting = name.partition("+")
        style = plotting.look(policy, index) | {"linestyle": "-" if drafting else "--"}
        axes.errorbar(
            lengths,
            y,
            yerr=plotting.spread(own, SPEED, f"{SPEED}_min", f"{SPEED}_max"),
            capsize=2,
            label=name,
            **style,
        )
        ratios = [f"{s[SPEED]:.2f} ({s['cpu_ratio_to_transformers']:.2f})" for s in own]
        print(f"| `{name}` | {' | '.join(ratios)} |")
    axes.set(xscale="log", xlabel="prompt tokens", ylabel="tokens per CPU second", ylim=(0, None))
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(ncols=2)
    first = records[0]
    repeats = first["systems"][0]["repeats"]
    tokens = f"{first['systems'][0]['new_tokens']} tokens each"
    setting = f"{first['dtype']} ({first['linear']})", f"kv_budget {first['kv_budget']}"
    plotting.title(made, first["model"], *setting, f"median and range of {repeats} repeats", tokens)
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
