"""The name of a feature, and the order in which features get their turn. Without torch: every worker knows names."""

from __future__ import annotations

from dataclasses import dataclass

from rayinterp.errors import UserError


@dataclass(frozen=True, order=True)
class FeatureId:
    """One latent of one SAE.

    Example:
        `str(FeatureId("layer_12", 4711)) == "layer_12/4711"`
    """

    sae: str
    index: int

    def __str__(self) -> str:
        return f"{self.sae}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Reads what `str` wrote.

        Raises:
            UserError: the text is not `sae/index`.
        """
        sae, slash, index = text.rpartition("/")
        if not slash or not sae or not index.isdigit():
            raise UserError(f"feature {text!r} is not of the form sae/index, e.g. layer_12/4711")
        return cls(sae, int(index))


def interleave(features: list[FeatureId]) -> list[FeatureId]:
    """Features of all SAEs in turn, so that a budget reaches each of them."""
    seen: dict[str, int] = {}
    place: dict[FeatureId, int] = {}
    for feature in features:
        place[feature] = seen[feature.sae] = seen.get(feature.sae, -1) + 1
    return sorted(features, key=lambda feature: (place[feature], feature.sae))
