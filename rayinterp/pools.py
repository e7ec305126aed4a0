"""How a stage that works unit by unit is spread over the cluster: one actor pool, described once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray.data

from rayinterp.config import PoolResources


def map_units(
    worker: type,
    arguments: tuple[Any, ...],
    units: Sequence[dict[str, Any]],
    resources: PoolResources,
    at_once: int = 1,
) -> ray.data.Dataset:
    """Units of work through a pool of `worker(*arguments)` actors, a block each, as a lazy Ray Dataset of results.

    Args:
        at_once: Units that one actor has in hand, each in a thread of its own.
    """
    results = ray.data.from_items(list(units), override_num_blocks=len(units)).map(
        worker,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(resources.num_actors, len(units)),
            max_size=min(resources.most_actors, len(units)),
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
    )
    results.set_name(worker.__name__)  # on Ray's dashboard
    return results
