"""`preflight`: compiles programs for hardware one does not have, and says whether they fit."""

import json

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.preflight import compiled, hardware, programs, search, view


def run(
    experiment: programs.Experiment,
    target: hardware.Target,
    program: str,
    mesh: str,
    microbatches: int,
    remat: str,
    price: float | None,
    is_search: bool,
    is_quick: bool,
    as_json: bool,
) -> int:
    """The command; 1 if the program, or every one that was tried, does not fit."""
    errors.check_one_of("--program", program, programs.PROGRAMS)
    errors.check_one_of("--remat", remat, t5.REMAT_POLICIES)
    if is_search:
        tried = search.search(experiment, target, program, is_quick=is_quick)
    else:
        if mesh == "auto":
            found = search.by_rule(experiment.rows(program), experiment.weight_bytes(), target)
            shape = found.data, found.fsdp, found.model
            microbatches = found.num_microbatches if program == "train" else 1
        else:
            shape = search.parse_mesh(mesh, target.count)
        # Evaluation computes nothing again.
        choice = compiled.Choice(*shape, microbatches, remat if program == "train" else "none")
        devices = target.devices()
        tried = [experiment.compile(target, devices, choice, program, is_quick=is_quick)]
    if as_json:
        print(json.dumps([made.to_json() for made in tried], indent=1))
    elif is_search:
        view.show_ranked(tried)
    else:
        view.show(tried[0], program, price, target)
    return int(not any(made.fits for made in tried))
