"""`preflight`: compiles programs for hardware one does not have, and says whether they fit."""

import dataclasses
import json

from moe_peft import errors
from moe_peft.commands import preflight_programs, preflight_search, preflight_view
from moe_peft.models import t5
from moe_peft.partitioning import flight as flight_lib
from moe_peft.partitioning import targets


def run(
    experiment: preflight_programs.Experiment,
    target: targets.Target,
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
    errors.check_one_of("--program", program, preflight_programs.PROGRAMS)
    errors.check_one_of("--remat", remat, t5.REMAT_POLICIES)
    if is_search:
        flights = preflight_search.search(experiment, target, program, is_quick=is_quick)
    else:
        setting = _setting(experiment, target, program, mesh, microbatches, remat)
        flights = [
            experiment.compile(target, target.devices(), setting, program, is_quick=is_quick)
        ]
    if as_json:
        print(json.dumps([flight.to_json() for flight in flights], indent=1))
    elif is_search:
        preflight_view.show_ranked(flights)
    else:
        preflight_view.show(flights[0], program, price, target)
    return int(not any(flight.fits for flight in flights))


def _setting(experiment, target, program, mesh, microbatches, remat) -> flight_lib.Setting:
    """As the flags say; evaluation computes nothing again."""
    if mesh == "auto":
        rows, weights = experiment.rows(program), experiment.weight_bytes()
        setting = preflight_search.by_rule(rows, weights, target)
        microbatches = setting.num_microbatches if program == "train" else 1
    else:
        shape = preflight_search.parse_mesh(mesh, target.count)
        setting = flight_lib.Setting(*shape, microbatches, remat)
    remat = remat if program == "train" else "none"
    return dataclasses.replace(setting, num_microbatches=microbatches, remat_policy=remat)
