"""Simulators: what predicts a feature's activations from an explanation. `load_simulator` makes one from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayinterp.config import SimulatorConfig
    from rayinterp.simulate.simulator import Simulator


def load_simulator(config: SimulatorConfig) -> Simulator:
    """Loads the engine that the config names; only that engine's packages are imported."""
    if config.engine == "oracle":
        from rayinterp.planted import OracleSimulator

        return OracleSimulator()
    from rayinterp import embedded

    if config.engine == "late_interaction":
        from rayinterp.simulate.late_interaction import LateInteractionSimulator

        name = config.embedder
        folder = str(embedded.embedder_path(name)) if embedded.is_embedded(name) else name
        return LateInteractionSimulator(folder, batch_size=config.batch_size)

    if config.engine == "vllm":
        from rayinterp.simulate.vllm import VllmSimulator

        return VllmSimulator(
            embedded.resolve(config.model),
            revision=config.revision,
            dtype=config.dtype,
            quantization=config.quantization,
            calibration=config.calibration,
            num_few_shots=config.num_few_shots,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
    from rayinterp.simulate.transformers import TransformersSimulator

    return TransformersSimulator(
        embedded.resolve(config.model),
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        quantization=config.quantization,
        attn_implementation=config.attn_implementation,
        calibration=config.calibration,
        num_few_shots=config.num_few_shots,
        token_budget=config.token_budget,
    )
