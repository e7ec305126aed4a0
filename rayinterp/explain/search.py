"""Tree search as an ask/tell object: it knows nothing of Ray, prompts or LLMs, and can be saved between any two calls.

    ask  -> proposals: a root (llm, lexical) or a revision of a node
    tell <- what became of one: an explanation with its scores, or why there is none

When a round's proposals have all been told, the nodes of the round and the nodes kept so far compete on their train
score, the best `width` are kept, and each is revised `branching_factor` times in the next round. The winner is chosen
on valid, among all nodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from rayinterp.explanation import Explanation, from_json, to_json

Kind = Literal["llm", "lexical", "revision"]


class SearchSettings(NamedTuple):
    num_llm_roots: int
    lexical_root: bool
    branching_factor: int
    width: int
    depth: int
    stop_score: float


class Proposal(NamedTuple):
    """A node that the search would like to have."""

    node: int
    kind: Kind
    parent: int | None


@dataclass
class Node:
    """What became of a proposal."""

    node: int
    kind: Kind
    parent: int | None
    depth: int
    explanation: Explanation | None = None
    status: str = "pending"
    """ok, duplicate, or why there is no score."""
    cascade_score: float | None = None
    """What a cheaper simulator thought of it."""
    train_score: float | None = None
    valid_score: float | None = None
    thought: str | None = None
    """Raw answer of the LLM."""
    feedback: str | None = None
    """What an explainer is told about this node when it revises it."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None


@dataclass
class TreeSearch:
    """The search of one feature."""

    settings: SearchSettings
    nodes: list[Node] = field(default_factory=list)
    beam: list[int] = field(default_factory=list)
    """Kept nodes, best first."""
    round: int = 0
    """Rounds of revision begun."""
    finished: bool = False

    def ask(self) -> list[Proposal]:
        """Proposals that wait for an outcome; begins the next round when there are none. Empty when the search is over.

        Asking twice without telling gives the same proposals.
        """
        if not self.nodes:
            self._propose("lexical", None, int(self.settings.lexical_root))
            self._propose("llm", None, self.settings.num_llm_roots)
        elif not self._pending() and not self.finished:
            self._end_round()
        if not self._pending():
            self.finished = True
        return [Proposal(node.node, node.kind, node.parent) for node in self._pending()]

    def tell(
        self,
        node: int,
        *,
        explanation: Explanation | None,
        status: str,
        cascade_score: float | None = None,
        train_score: float | None = None,
        valid_score: float | None = None,
        thought: str | None = None,
        feedback: str | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cost_usd: float | None = None,
    ) -> None:
        """Takes the outcome of one proposal; `explanation` is None where none could be had."""
        told = self.nodes[node]
        assert told.status == "pending", f"node {node} has been told already ({told.status})"
        told.explanation, told.status, told.thought, told.feedback = explanation, status, thought, feedback
        told.cascade_score, told.train_score, told.valid_score = cascade_score, train_score, valid_score
        told.prompt_tokens, told.completion_tokens, told.cost_usd = prompt_tokens, completion_tokens, cost_usd

    def seen(self, explanation: Explanation) -> bool:
        """Whether a node already holds this explanation: an equal candidate need not be simulated."""
        return any(node.explanation == explanation for node in self.nodes)

    def stop(self) -> None:
        """Ends the search after what has been told: a time limit or a budget."""
        self.finished = True
        for node in self._pending():
            node.status = "stopped"

    def winner(self) -> Node | None:
        """The node with the best valid score; the earlier one of equals; None where no node has a score."""
        scored = [node for node in self.nodes if node.valid_score is not None]
        return max(scored, key=lambda node: (node.valid_score, -node.node), default=None)

    def path(self, node: int) -> list[Node]:
        """From the root down to the node."""
        steps = [self.nodes[node]]
        while steps[-1].parent is not None:
            steps.append(self.nodes[steps[-1].parent])
        return steps[::-1]

    def state(self) -> dict[str, Any]:
        """The search as plain data, for JSON."""
        nodes = [
            {**asdict(node), "explanation": None if node.explanation is None else to_json(node.explanation)}
            for node in self.nodes
        ]
        return {
            "settings": self.settings._asdict(),
            "nodes": nodes,
            "beam": list(self.beam),
            "round": self.round,
            "finished": self.finished,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> TreeSearch:
        """The search that `state` describes."""
        nodes = [
            Node(**{**node, "explanation": from_json(node["explanation"]) if node["explanation"] else None})
            for node in state["nodes"]
        ]
        settings = SearchSettings(**state["settings"])
        return cls(settings, nodes, list(state["beam"]), state["round"], state["finished"])

    def _pending(self) -> list[Node]:
        return [node for node in self.nodes if node.status == "pending"]

    def _propose(self, kind: Kind, parent: int | None, count: int) -> None:
        depth = 0 if parent is None else self.nodes[parent].depth + 1
        for _ in range(count):
            self.nodes.append(Node(len(self.nodes), kind, parent, depth))

    def _end_round(self) -> None:
        scored = [node for node in self.nodes if node.train_score is not None and node.status == "ok"]
        ranked = sorted(scored, key=lambda node: (-node.train_score, node.node))  # type: ignore[operator]
        before, self.beam = self.beam, [node.node for node in ranked[: self.settings.width]]
        best = ranked[0].train_score if ranked else None
        if best is None or best >= self.settings.stop_score or self.round >= self.settings.depth or self.beam == before:
            self.finished = True
            return
        self.round += 1
        for node in self.beam:
            self._propose("revision", node, self.settings.branching_factor)
