"""simpool-dino: every program as a command of the installed package.

    simpool-dino pretrain --data_path demo
    simpool-dino knn --help

Each command is one of the programs that lie at the root of a checkout. To run one in several processes, hand its module
to torchrun: `torchrun --nproc_per_node 8 -m simpool_dino.main_dino ...`.
"""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {  # name: (module, what it does); setup.py reads this too
    "pretrain": ("main_dino", "pretrain with DINO, without labels"),
    "attmask": ("main_attmask", "pretrain with iBOT and attention-guided masks"),
    "supervised": ("main_supervised", "train with labels, or fine-tune"),
    "knn": ("eval_knn", "weighted k-NN on frozen features"),
    "linear": ("eval_linear", "linear and attentive probes on frozen features"),
    "localize": ("eval_localization", "boxes from attention maps"),
    "background": ("eval_background", "how much a classifier relies on the background"),
    "attention": ("visualize_attention", "attention maps as pictures"),
    "export": ("export", "write a backbone for other software"),
    "pack": ("tools.pack_shards", "pack images into tar shards"),
    "check": ("tools.check_images", "list the images that can't be read"),
}
EXIT_BAD_INPUT = 2  # runtime.guards' value, without its import of torch


def main(argv: list[str] | None = None) -> int:
    """Run a command with the arguments that follow it; a program leaves the process with its own exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: simpool-dino COMMAND [flags]; --help after a command lists its flags\n")
        print("\n".join(f"  {name:12}{purpose}" for name, (_, purpose) in COMMANDS.items()))
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {command!r}; {hint}", file=sys.stderr)
        return EXIT_BAD_INPUT
    prefix = f"{__package__}." if __package__ else ""
    program = importlib.import_module(prefix + COMMANDS[command][0])
    guards = importlib.import_module(f"{prefix}runtime.guards")
    guards.run_program(program.main, rest)


if __name__ == "__main__":
    sys.exit(main())
