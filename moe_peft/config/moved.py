"""Modules that gin files of version 0.1 import, and where they are now, below `moe_peft`.

The settings of a run that was made before hold such lines. Names of configurables did not change.
"""

MOVED = {
    "analysis.alignment": "training.monitors.alignment",
    "analysis.plan": "preflight.plan",
    "analysis.routing_course": "training.monitors.routing",
    "commands.data_prepare": "cli.data_prepare",
    "commands.data_show": "cli.data_show",
    "commands.export": "convert.export",
    "commands.merge": "convert.merge",
    "commands.preflight_programs": "preflight.programs",
    "data.places": "data.roots",
    "soup": "adaptation.soup",
    "training.adapt": "adaptation.adapt",
    "training.backbone": "weights.backbone",
    "training.loop": "training.train",
    "transfer": "methods.transfer",
}


def current(module: str) -> str:
    """Returns the name that a module has today.

    >>> current("moe_peft.training.loop"), current("my_tasks")
    ('moe_peft.training.train', 'my_tasks')
    """
    package, _, name = module.partition(".")
    return f"{package}.{MOVED[name]}" if package == "moe_peft" and name in MOVED else module


def former(module: str) -> str:
    """Returns the name that version 0.1 had for a module; digests of settings are of those.

    >>> former("moe_peft.methods.transfer")
    'moe_peft.transfer'
    """
    package, _, name = module.partition(".")
    return next((f"{package}.{old}" for old, new in MOVED.items() if new == name), module)
