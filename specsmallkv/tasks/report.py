"""task=report: any set of records as tables (CSV, Markdown, LaTeX) and one HTML page with pictures; runs no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..display import Display
from ..errors import UserError
from ..figures import figures
from ..page import assemble
from ..record import write_whole
from ..records import (
    Collection,
    as_csv,
    as_latex,
    as_markdown,
    by_task,
    collect,
    columns,
    differences,
    heading,
    is_number,
    shown,
    surroundings,
)


@dataclass
class ReportTask:
    """dir: where the records lie, at any depth. output_dir: where the report goes; None: the run's directory."""

    name: str
    dir: str | None
    output_dir: str | None

    def run(self, config: RunConfig) -> dict[str, Any]:
        if self.dir is None:
            raise UserError("task=report needs the records; set task.dir=DIR.")
        collection = collect(Path(self.dir).expanduser())
        output = Path(self.output_dir or str(config.run_dir)).expanduser()
        page = assemble("study", f"Report of {Path(self.dir).resolve().name}", study(collection, self.dir))
        rows = collection.rows
        files = {
            "report.html": page,
            "table.csv": as_csv(rows),
            "table.md": as_markdown(rows),
            "table.tex": as_latex(rows),
        }
        for name, text in files.items():
            write_whole(output / name, text)
        console = Display(config.quiet).console
        console.print(f"{len(collection.records)} records, {len(rows)} rows, {len(collection.failed)} failed")
        console.print(f"report: {output / 'report.html'}", soft_wrap=True, highlight=False)
        console.print("tables: table.csv, table.md and table.tex beside it")
        return {
            "num_records": len(collection.records),
            "num_rows": len(rows),
            "num_failed": len(collection.failed),
            "report": str(output / "report.html"),
            "tables": [str(output / name) for name in files if name.startswith("table")],
        }


def study(collection: Collection, directory: str) -> dict[str, Any]:
    """What the page shows."""
    common, differing = differences(collection.records)
    return {
        "directory": str(Path(directory).resolve().name),
        "records": len(collection.records),
        "rows": len(collection.rows),
        "failed": collection.failed,
        "interrupted": [path for path, record in collection.records.items() if record.get("interrupted")],
        "figures": figures(collection.rows, collection.settings),
        "tables": [table(task, rows) for task, rows in by_task(collection.rows).items()],
        "surroundings": [found | {"records": count} for found, count in surroundings(collection.records.values())],
        "common": common,
        "differing": differing,
        "commands": {path: record.get("overrides") for path, record in collection.records.items()},
    }


def table(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = columns(rows)
    return {
        "task": task,
        "head": [heading(key) for key in names],
        "numbers": [i for i, key in enumerate(names) if is_number(key, rows)],
        "rows": [[shown(key, row.get(key)) for key in names] for row in rows],
    }
