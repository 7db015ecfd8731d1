"""Copy the records of a run or sweep to experiments/records, without what is long or belongs to one machine.

python experiments/keep.py outputs/kl-budget-smollm2-135m kl_budget [KEY ...]

Each KEY is left out as well, e.g. over_decoding, of a record from which no picture of it is drawn.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from specsmallkv.records import collect

LEFT_OUT = {"kept_per_layer", "attention_recall_per_layer", "text", "token_ids", "groups", "by_prompt"}
LEFT_OUT |= {"examples_file", "answer_files", "output", "run_dir", "report", "trace"}
DIRECTORY = re.compile(r"(?<![\w.:~/-])/(?:[^/\s,\[\]='\"]+/)+")  # of one machine: only what lies in it is told
LONGEST_NAME = 80
HERE = Path(__file__).resolve().parent


def trimmed(value: Any, inside: bool = False) -> Any:
    """Five digits are enough for a picture. Generated texts are left out; the `text` of a result is a file's name."""
    if isinstance(value, dict):
        return {k: trimmed(v, True) for k, v in value.items() if k not in LEFT_OUT or (inside and is_name(k, v))}
    if isinstance(value, list):
        return [trimmed(item, True) for item in value]
    if isinstance(value, str):
        return DIRECTORY.sub("", value)
    return float(f"{value:.5g}") if isinstance(value, float) else value


def is_name(key: str, value: Any) -> bool:
    return key == "text" and isinstance(value, str) and "\n" not in value and len(value) < LONGEST_NAME


def main(source: str, name: str, *besides: str) -> None:
    LEFT_OUT.update(besides)
    for path, record in collect(Path(source)).records.items():
        part = Path(path).parent.name or "record"
        target = HERE / "records" / name / f"{part}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = json.dumps(trimmed(record), ensure_ascii=False, indent=1)
        target.write_text(compact(lines) + "\n", encoding="utf-8")
        print(target)


def compact(indented: str) -> str:
    """A line for each key of the record and each result, so that differences can be read."""
    out: list[str] = []
    for line in indented.splitlines():
        depth = len(line) - len(line.lstrip())
        out.append(f"\n{line}" if depth < 3 and out and line.strip() not in ("}", "},", "]", "],") else line.strip())
    return "".join(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
