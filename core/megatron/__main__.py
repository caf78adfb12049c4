"""``torchrun ... -m shardstep.core.megatron pretrain_gpt.py --optimizer shardstep_muon ...``: an unmodified script.

``python -m shardstep.core.megatron --patches`` lists the functions of Megatron-Core that are patched, and what for.
"""

import os
import runpy
import sys

from .flags import extend_arguments
from .upstream import installed, reasons


def main() -> None:
    """Run the script that the command line names, with the rest of the command line; or list the patched functions."""
    if sys.argv[1:] == ["--patches"]:
        extend_arguments()
        print(f"patched in Megatron-Core {installed()}:")
        print("\n".join(f"{name}\n    {reason}" for name, reason in reasons().items()))
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(
            "name a script: torchrun ... -m shardstep.core.megatron pretrain_gpt.py --optimizer shardstep_muon ...\n"
            "or list the functions of Megatron-Core that are patched: python -m shardstep.core.megatron --patches"
        )
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f"{script} is not a file; give the path of the script that torchrun would run.")
    extend_arguments()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does for a script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
