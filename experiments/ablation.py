"""Compensations and parts of specsmallkv, alone or left out: `+experiment=ablation`, `parts`, `marginal`, `packed`."""

import plotting

RECORDS = "ablation"

LABELS = {  # by the settings that an entry changes
    "": "the preset",
    "own_share=1,marginal_share=0,compensation=none": "neither compensation",
    "own_share=1,marginal_share=0,compensation=none,num_foreseen_tokens=0": "neither compensation",
    "marginal_share=0,compensation=none": "saliency alone",
    "own_share=1": "marginal alone",
    "own_share=1,num_foreseen_tokens=0": "marginal alone",
    "own_share=1,num_foreseen_tokens=0,marginal_similarity=0": "marginal alone",
    "tail_factor=0,weigh_rows=false,matching=one_hot": "none of these three",
    "tail_factor=0": "without tail term",
    "weigh_rows=false": "rows not weighed",
    "matching=one_hot": "most similar head",
    "map_rows=0": "map of the prompt alone",
    "map_rows=.inf": "saved map alone",
    "group_reduction=mean": "mean over the group",
    "tail_factor=0.8": "tail factor 0.8",
    "tail_pool=4": "tail pool 4",
    "key_bits=8,value_bits=8": "keys and values in 8 bits",
    "key_bits=8,value_bits=4": "keys in 8, values in 4 bits",
    "key_bits=4,value_bits=4": "keys and values in 4 bits",
    "marginal_bits=null": "marginal values as computed",
    "marginal_bits=8,marginal_share=0.2": "8 bits, a fifth of the bytes",
    "marginal_share=0.15": "4 bits, 0.15 of the bytes",
}


def main() -> None:
    rows = plotting.rows(RECORDS)
    families = dict.fromkeys(row["policy"].partition(":")[0] for row in rows if ":" in row["policy"])
    made, panels = plotting.canvas(len(families), width=4.2, height=2.8)
    for axes, family in zip(panels, families, strict=True):
        own = [row for row in rows if row["policy"].partition(":")[0] == family]
        axes.sharex(panels[0])
        variants = list(dict.fromkeys(row["policy"] for row in own))
        for index, budget in enumerate(sorted({row["kv_budget"] for row in own})):
            points = [next(row for row in own if (row["policy"], row["kv_budget"]) == (v, budget)) for v in variants]
            x, y = [row["kl_mean"] for row in points], [place + 0.12 * index for place in range(len(variants))]
            style = plotting.look("", index) | {"linestyle": "none"}
            axes.errorbar(x, y, xerr=plotting.spread(points, "kl_mean"), capsize=2, label=f"{budget:.0%}", **style)
        axes.set(title=family, xscale="log", xlabel="KL(full, policy), nats per token")
        plotting.plain_ticks(axes.xaxis)
        axes.set_yticks(range(len(variants)), [LABELS.get(v.partition(":")[2], "all") for v in variants])
        axes.invert_yaxis()
    made.legend(*panels[-1].get_legend_handles_labels(), title="kv_budget", loc="outside right center")
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['scored_tokens']} positions", "95% bootstrap intervals")
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
