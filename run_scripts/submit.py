"""Submit a pretraining run to SLURM, followed by its evaluations.

    python run_scripts/submit.py --nodes 2 --ngpus 8 --eval_knn -- --arch vit_small --mode simpool \\
        --data_path /path/to/imagenet --output_dir output/vit_small

Everything after `--` is passed to main_dino.py, or to the training program that --program names. The batch scripts are
those of run_scripts/slurm with the options given here; they are written to OUTPUT_DIR/slurm, where they can be read, or
submitted again, later. Evaluations start once the training has succeeded (`--dependency=afterok`), and check for its
marker DONE.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = ("eval_knn", "eval_linear")
PROGRAMS = ("main_dino.py", "main_attmask.py", "main_supervised.py")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options for SLURM, and the training program's flags after `--`."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="submit.py [options] -- FLAGS OF THE PROGRAM",
    )  # fmt: skip
    parser.add_argument("--program", choices=PROGRAMS, default=PROGRAMS[0], help="what to run (default main_dino.py)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    parser.add_argument(
        "--ngpus", type=int, default=8, help="GPUs per node, one task each; 0 for CPU tasks (default 8)"
    )
    parser.add_argument("--tasks", type=int, help="tasks per node of a job without GPUs (default 1)")
    parser.add_argument("--cpus_per_task", type=int, default=10, help="cores per task (default 10)")
    parser.add_argument("--time", default="24:00:00", help="time limit of a start; the job requeues itself (24:00:00)")
    parser.add_argument("--signal_s", type=int, default=120, help="seconds before the limit to save (default 120)")
    for name, what in (
        ("partition", "partition"),
        ("account", "account"),
        ("qos", "quality of service"),
        ("constraint", "node features"),
        ("mem", "memory per node"),
        ("job_name", "name (pretrain)"),
    ):
        parser.add_argument(f"--{name}", help=what)  # fmt: skip
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other sbatch option")
    parser.add_argument("--launcher", choices=("srun", "torchrun"), default="srun", help="what starts the processes")
    parser.add_argument("--eval_knn", action="store_true", help="k-NN when the pretraining is done")
    parser.add_argument("--eval_linear", action="store_true", help="linear probes when the pretraining is done")
    parser.add_argument("--submitit", action="store_true", help="submit with the package submitit, if it is installed")
    parser.add_argument("--dry_run", action="store_true", help="print the scripts without submitting them")
    args = parser.parse_args(own)
    for name in ("nodes", "cpus_per_task", "signal_s"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.ngpus < 0 or (args.tasks is not None and args.tasks < 1):
        parser.error(f"--ngpus {args.ngpus} --tasks {args.tasks}: must be 0 or more GPUs, 1 or more tasks")
    if args.ngpus and args.tasks not in (None, args.ngpus):
        parser.error(f"--tasks {args.tasks} with --ngpus {args.ngpus}: there is one task per GPU; leave --tasks out")
    for option in args.sbatch:
        if re.fullmatch(r"(--)?[a-z][a-z-]*=.*", option, re.DOTALL) is None:
            parser.error(f"--sbatch {option!r}: give OPTION=VALUE, as in --sbatch exclude=node7")
    for value in (*own, *flags):
        if not value.isprintable():
            parser.error(
                f"{value!r} contains a control character, which could start a line of the batch script; remove it"
            )
    if args.job_name and "/" in args.job_name:
        parser.error(f"--job_name {args.job_name!r}: it becomes part of file names; leave the / out")
    if args.submitit and (args.eval_knn or args.eval_linear or args.launcher == "torchrun" or args.dry_run):
        parser.error("--submitit submits the pretraining alone, by srun; leave --eval_*, --launcher and --dry_run out")
    if not flags:
        parser.error(f"{args.program}'s flags are missing; give them after --")
    return args, flags


def taken_out(flags: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a flag of the program (`--name value`, `--name=value`, dashes too), and the flags without it."""
    value, rest, i = None, [], 0
    spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
    while i < len(flags):
        flag, equals, inline = flags[i].partition("=")
        if flag not in spellings:
            rest.append(flags[i])
        elif equals:
            value = inline
        else:
            i += 1
            value = flags[i] if i < len(flags) else None
        i += 1
    return value, rest


def sbatch_options(args: argparse.Namespace, kind: str) -> dict[str, str]:
    """The sbatch options given here, by name; they replace those of the script in run_scripts/slurm."""
    tasks = args.ngpus or args.tasks or 1
    options = {"nodes": args.nodes, "ntasks-per-node": tasks, "cpus-per-task": args.cpus_per_task, "time": args.time}
    options["gpus-per-node"] = args.ngpus or None
    for name in ("partition", "account", "qos", "constraint", "mem"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    options["job-name"] = (args.job_name or "pretrain") if kind == "pretrain" else f"{args.job_name or ''}{kind}"
    if kind == "pretrain":
        options["signal"] = f"USR1@{args.signal_s}"
    options |= dict(option.lstrip("-").split("=", 1) for option in args.sbatch)
    return {name: None if value is None else str(value) for name, value in options.items()}


def directive_value(value: str) -> str:
    """The value quoted for an #SBATCH line, where spaces separate options and a # starts a comment."""
    if re.fullmatch(r"[\w@%+=:,./\[\]*&|()-]*", value, re.ASCII):
        return value
    if '"' in value or "\\" in value:
        sys.exit(f'error: {value!r} cannot be written into a batch script; leave " and \\ out of it')
    return f'"{value}"'


def batch_script(kind: str, options: dict[str, str], variables: dict[str, str], flags: list[str]) -> str:
    """run_scripts/slurm/KIND.sbatch with these options, variables and flags inserted; None removes an option."""
    head, body, left = [], [], dict(options)
    for line in (ROOT / "run_scripts" / "slurm" / f"{kind}.sbatch").read_text().splitlines():
        if line.startswith("#SBATCH --"):
            name = line.removeprefix("#SBATCH --").split("=")[0]
            value = left.pop(name) if name in left else line.removeprefix("#SBATCH --").partition("=")[2]
            if value is not None:
                head.append(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}")  # quoted already
        elif not line.startswith("#"):
            body.append(line)
    head += [f"#SBATCH --{name}={value}" for name, value in left.items() if value is not None]
    export = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(["#!/usr/bin/env bash", *head, *export, f"set -- {shlex.join(flags)}", *body]) + "\n"


def plan(args: argparse.Namespace, flags: list[str]) -> list[tuple[str, Path, str]]:
    """(kind, path, content) of each script to submit, the pretraining first."""
    out, flags = taken_out(flags, "output_dir")
    data, flags = taken_out(flags, "data_path")
    if not out or not data:
        missing = "--output_dir" if not out else "--data_path"
        sys.exit(f"error: {missing} is missing among {args.program}'s flags, which come after --")
    data = str(Path(data).resolve()) if Path(data).exists() else data
    folder = Path(out).resolve()
    variables = {"OUT": str(folder), "DATA": data, "LAUNCHER": args.launcher, "PROGRAM": args.program}
    kinds = ["pretrain", *(kind for kind in EVALUATIONS if getattr(args, kind))]
    scripts = []
    for kind in kinds:
        output = str(folder / "slurm").replace("%", "%%") + f"/{kind}-%j.out"  # sbatch replaces %j, and %% by %
        options = sbatch_options(args, kind) | {"output": output}
        options = {name: None if value is None else directive_value(value) for name, value in options.items()}
        own = flags if kind == "pretrain" else []
        scripts.append((kind, folder / "slurm" / f"{kind}.sbatch", batch_script(kind, options, variables, own)))
    return scripts


def submit(path: Path, after: str | None) -> str:
    """Submit a script with sbatch; returns the job's number."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterok:{after}"] if after else []), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


class Pretraining:
    """The program as a task of a submitit job. It catches the signal itself, saves, and requeues the job."""

    def __init__(self, program: str, flags: list[str]) -> None:
        self.program, self.flags = program, flags

    def __call__(self) -> int:
        sys.path.insert(0, str(ROOT))
        return importlib.import_module(Path(self.program).stem).main(["--requeue", "true", *self.flags])


def submit_by_submitit(args: argparse.Namespace, flags: list[str]) -> str:
    """Submit with submitit, which keeps its scripts and logs in OUTPUT_DIR/submitit; returns the job's number."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # the signal that it requests from SLURM; its default differs
    try:
        import submitit
    except ImportError:
        sys.exit("error: --submitit needs the package submitit (pip install submitit); without the flag sbatch is used")
    out, _ = taken_out(flags, "output_dir")
    if not out:
        sys.exit(f"error: --output_dir is missing among {args.program}'s flags, which come after --")
    own = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "job-name", "signal"}
    options = sbatch_options(args, "pretrain")
    executor = submitit.SlurmExecutor(folder=Path(out).resolve() / "submitit")
    executor.update_parameters(
        job_name=options["job-name"], nodes=args.nodes, ntasks_per_node=int(options["ntasks-per-node"]),
        gpus_per_node=args.ngpus or None, cpus_per_task=args.cpus_per_task, time=options["time"],
        signal_delay_s=args.signal_s, stderr_to_stdout=True,
        additional_parameters={"requeue": True, **{k: v for k, v in options.items() if k not in own}},
    )  # fmt: skip
    return executor.submit(Pretraining(args.program, flags)).job_id


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args, flags = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.submitit:
        print(f"pretrain: job {submit_by_submitit(args, flags)}")
        return 0
    scripts = plan(args, flags)
    if args.dry_run:
        for _, path, content in scripts:
            print(f"== {path}\n{content}")
        return 0
    if shutil.which("sbatch") is None:
        sys.exit("error: sbatch is not on this machine's PATH; run this on a login node of the cluster, or --dry_run")
    pretraining = None
    for kind, path, content in scripts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        job = submit(path, pretraining)
        print(f"{kind}: job {job}, {os.path.relpath(path)}" + (f", after {pretraining}" if pretraining else ""))
        pretraining = pretraining or job
    return 0


if __name__ == "__main__":
    sys.exit(main())
