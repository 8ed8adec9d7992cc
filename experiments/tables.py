"""Tables of an experiment's runs: results.csv, a Markdown table and a picture, made from the files of the runs.

    python -m experiments.tables pooling --runs output/experiments/pooling
    python -m experiments.tables                    every experiment again, from the raw files that it keeps
    python -m experiments.tables --check            change nothing; exit code 1 if a table is not what its files give

A run is a folder LABEL/seedN with config.json, log.txt and the JSON files of evaluations (k-NN, linear probes,
localisation ...), as the programs write them. --runs copies these texts of the finished runs, not the weights, to
experiments/NAME/runs, with the folders of runs and images cut out of them; every number of results.csv comes from
there, and each row of the table links to them. table.json next to run.sh names the title, the columns, the label that
the others are compared with (baseline: a label, or its last word if each model has one, such as "official" for
vit_official and resnet_official) and the order of the rows (by default the first column's).

The README next to the experiments' folder has a table of all of them, a line each, which is made and checked here too.

Numbers are means over seeds and, from two seeds on, their sample standard deviation. A difference to the baseline is
taken seed by seed, over the seeds that both have, so what a seed does to both cancels out.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from experiments.measurements import RUN, Measurement, RunFolder, find_runs, read_csv, read_json, read_run, to_csv
from experiments.rows import Row, baseline_of, compare, markdown, picture
from experiments.summary import line, replaced
from runtime.cli import add_flag, parse_described
from runtime.guards import EXIT_DONE, InputError, run_program
from runtime.terminal import say

ROOT = Path(__file__).resolve().parent
EXIT_DIFFERENT = 1


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("experiments.tables", add_help=False)
    parser.add_argument("names", nargs="*", help="experiments, folders of experiments/ (default: all that have runs)")
    add_flag(parser, "--runs", type=Path, help="folder of new runs, LABEL/seedN, whose texts are kept from now on")
    add_flag(parser, "--folder", type=Path, default=ROOT, help="folder of the experiments")
    add_flag(parser, "--check", action="store_true", help="write nothing; exit code 1 if anything differs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_described(get_args_parser(), __doc__, argv)
    if args.runs is not None and (len(args.names) != 1 or args.check):
        raise InputError("--runs belongs to one experiment: name it, as in `experiments.tables pooling --runs FOLDER`")
    folders = [experiment(args.folder, name) for name in args.names] or with_results(args.folder)
    if args.runs is not None:
        keep(args.runs, folders[0])
    different = [path for folder in folders for path in make(folder, args.check)]
    different += summarize(args.folder, args.check)
    if different:
        say(f"not what the runs give: {', '.join(map(str, different))}; make them with python -m experiments.tables")
        return EXIT_DIFFERENT
    return EXIT_DONE


def experiment(root: Path, name: str) -> Path:
    """The folder of an experiment. Raises InputError if there is none of this name."""
    folder = root / name
    if not folder.is_dir():
        there = ", ".join(sorted(path.parent.name for path in root.glob("*/table.json"))) or "none"
        raise InputError(f"there is no experiment {name!r} in {root}; there are: {there}")
    return folder


def with_results(root: Path) -> list[Path]:
    """The experiments that have runs or a results.csv."""
    return sorted(path for path in root.iterdir() if (path / "runs").is_dir() or (path / "results.csv").is_file())


# ---- one experiment -------------------------------------------------------------------------------------------------


def keep(source: Path, folder: Path) -> None:
    """Copy the texts of finished runs to folder/runs, in place of earlier ones of the same label and seed.

    Raises InputError if there is no finished run.
    """
    runs, kept = find_runs(source), 0
    for run in runs:
        if not (run.path / "DONE").exists():
            say(f"left out: {run.name} is not finished")
            continue
        target = folder / "runs" / run.name
        if target.exists():
            shutil.rmtree(target)
        for path in run.files():
            copy = target / path.relative_to(run.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(without_folders(path.read_text(), source, run))
        kept += 1
    if not kept:
        raise InputError(f"--runs {source} has no finished run; a run is a folder {RUN} with config.json and DONE")
    say(f"{kept} runs kept in {folder / 'runs'}")


def without_folders(text: str, source: Path, run: RunFolder) -> str:
    """The text of a run without the places where its files lay on a machine: they say nothing, and may be private."""
    images = (
        str(read_json(run.path / "config.json").get("data_path") or "") if (run.path / "config.json").is_file() else ""
    )
    for place, name in ((str(source.resolve()), "runs"), (str(source), "runs"), (images, Path(images).name)):
        if "/" in place:
            text = text.replace(place, name)
    return text


def make(folder: Path, check: bool) -> list[Path]:
    """Write results.csv, table.md and table.png of an experiment, or compare the texts with those there.

    Returns the files that differ, when checking. Raises InputError if there is nothing to make them of.
    """
    description = describe(folder)
    texts: dict[Path, str] = {}
    if (folder / "runs").is_dir():
        measured = [entry for run in find_runs(folder / "runs") for entry in read_run(run, folder)]
        texts[folder / "results.csv"] = to_csv(measured)
    else:
        measured = read_csv(folder / "results.csv")
    rows, columns = rows_of(measured, description, folder)
    texts[folder / "table.md"] = markdown(description["title"], rows, columns, description.get("baseline"))
    if check:
        return [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path, text in texts.items():
        path.write_text(text)
    picture(rows, next(iter(columns.items())), description["title"], folder / "table.png")
    say(f"{folder}: {len(rows)} rows, {len(measured)} numbers\n\n{texts[folder / 'table.md']}")
    return []


def summarize(root: Path, check: bool) -> list[Path]:
    """Write the table of the README next to the experiments' folder, or compare it; returns the page if it differs.

    A folder without a README next to it has no such table.
    """
    page, lines = root.parent / "README.md", []
    if not page.is_file():
        return []
    for folder in with_results(root):
        description = describe(folder)
        rows, columns = rows_of(read_csv(folder / "results.csv"), description, folder)
        lines.append(line(folder, description["title"], rows, *next(iter(columns.items()))))
    text = replaced(page, lines)
    if check:
        return [] if text == page.read_text() else [page]
    page.write_text(text)
    return []


def describe(folder: Path) -> dict:
    """table.json of an experiment; by default the folder's name, every top-1 as a column, no baseline."""
    path = folder / "table.json"
    if not path.is_file():
        return {"title": folder.name}
    description = read_json(path)
    known = ("title", "baseline", "columns", "order")
    unknown = [key for key in description if key not in known]
    if unknown or "title" not in description:
        wrong = ", ".join(unknown) or "no title"
        raise InputError(f"{path} has {wrong}: give a title, and any of {', '.join(known[1:])}")
    return description


def rows_of(measured: list[Measurement], description: dict, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows and columns of the table. Raises InputError if no run has any of the columns, or none is the baseline."""
    metrics = list(dict.fromkeys(entry.metric for entry in measured))
    columns = description.get("columns") or {m: m for m in metrics if m.endswith(("top1", "top-1"))}
    columns = {metric: title for metric, title in columns.items() if metric in metrics}
    if not columns:
        raise InputError(f"{folder}: no run has a column of the table; there are: {', '.join(metrics[:20]) or 'none'}")
    baseline, labels = description.get("baseline"), {entry.label for entry in measured}
    if baseline is not None and not any(baseline_of(label, baseline, labels) for label in labels):
        say(f"warning: {folder}: the baseline {baseline} has no run, so nothing is compared with it")
        baseline = description["baseline"] = None
    return compare(measured, list(columns), baseline, description.get("order", ())), columns


if __name__ == "__main__":
    run_program(main)
