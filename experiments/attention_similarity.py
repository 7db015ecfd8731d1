"""Target rows against what the draft's predict, head by head (paper: Fig. 1c): `+experiment=attention-similarity`."""

import plotting

RECORDS = "attention"


def main() -> None:
    records = [r for r in plotting.records(RECORDS).records.values() if r["task"] == "calibrate"]
    trained = next(record for record in records if not record["config"]["task"]["untrained"])
    untrained = next(record for record in records if record["config"]["task"]["untrained"])
    single, mixed = (min(trained["results"], key=lambda r: abs(r["num_draft_heads"] - n)) for n in (1, 16))
    random = trained["controls"][0]
    lines = [("mixture of 16 draft heads", mixed), ("best single draft head", single)]
    lines += [("control: a random draft head", random), ("control: untrained draft, mixture", best(untrained))]
    made, (left, right) = plotting.canvas(2, height=3.8)
    for index, (name, row) in enumerate(lines):
        left.plot(row["cosine_per_layer"], label=f"{name}: {row['cosine']:.2f}", **plotting.look(name, index))
        values = [row["mass_at_0.05"], row["mass_at_0.1"]]
        right.bar([x + index / 6 for x in (0, 1)], values, 1 / 6, color=plotting.OTHERS[index])
    oracle = [mixed["mass_at_0.05_oracle"], mixed["mass_at_0.1_oracle"]]
    right.bar([x + 4 / 6 for x in (0, 1)], oracle, 1 / 6, color="black", label="the true row itself")
    left.set(xlabel="target layer", ylabel="cosine to the target's rows", ylim=(0, 1))
    right.set(ylabel="attention mass caught", ylim=(0, 1))
    right.set_xticks([1 / 3, 4 / 3], ["top 5%", "top 10%"])
    made.legend(loc="outside lower center", ncols=2)
    rows, texts = trained["num_rows"], len(trained["texts"])
    plotting.title(made, trained["model"], f"{texts} texts", f"{rows} rows", "each predicted by the others' map")
    plotting.save(made, __file__)


def best(record: dict) -> dict:
    return next(row for row in record["results"] if row["chosen"])


if __name__ == "__main__":
    main()
