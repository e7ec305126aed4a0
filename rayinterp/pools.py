"""Where a stage's actors live: pools that are spread over the cluster, and what stays beside the driver."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayinterp.config import PoolResources

if TYPE_CHECKING:
    import ray.data


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
    import ray.data  # a second, which every worker of a run would pay

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


def torch_threads(num_actors: int) -> int:
    """Torch threads for one of `num_actors` on this machine: Ray would give each actor a single one."""
    return max(1, (os.cpu_count() or 1) // num_actors)


def beside_driver(soft: bool = False) -> NodeAffinitySchedulingStrategy:
    """Keeps an actor on the driver's node. One that asks for no CPU is otherwise put on any node, also on a spot node,
    whose end would be the actor's.

    Args:
        soft: Whether it may be started anew elsewhere.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=soft)
