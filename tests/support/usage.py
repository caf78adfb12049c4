"""What the main job says of a command line before anything starts."""

from tools.pretrain.arguments import parse_arguments
from tools.pretrain.launch import Launch, Machine
from tools.pretrain.param_rules import check_rules
from tools.pretrain.validation import gpt_config, validate

CPU = Machine()


def check(line: list[str] | str, world: int = 1, machine: Machine = CPU, local_size: int = 1) -> None:
    """All checks of the main job that come before its process group, for rank 0."""
    args = parse_arguments(line.split() if isinstance(line, str) else line)
    validate(args, Launch(world_size=world, local_size=local_size), machine)
    check_rules(args, gpt_config(args, vocab_size=264))
