"""Tree search as an ask/tell object: it knows nothing of Ray, prompts or LLMs, and can be saved between any two calls.

    ask  -> steps, all of one action        tell <- what came of one
      propose   a root, or a revision of a node  explained: an explanation, or why there is none
      look      a cheap score of a candidate     looked: the score; the round's best go on, the others are pruned
      score     the real one                     scored: train and valid scores, and what to tell an explainer
      rescore   the same on a train set that     rescored
                the falsifier may have grown

A round is a set of new candidates. When all of it has been scored, its nodes and the nodes kept so far compete on their
train score (`beam`: the best `width` stay and are revised; `best_first`: the best node that has no revisions yet is
revised, however old it is). The winner is chosen on valid, among all nodes; where the falsifier looks at the finalists
too, on a valid set that holds what sounds like any of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from rayinterp.explanation import Explanation, from_json, to_json

Kind = Literal["llm", "lexical", "revision"]
Action = Literal["propose", "look", "score", "rescore"]


class SearchSettings(NamedTuple):
    num_llm_roots: int
    lexical_root: bool
    branching_factor: int
    width: int
    depth: int
    stop_score: float
    strategy: Literal["beam", "best_first"] = "beam"
    num_looks: int = 0
    """Cheap looks at a candidate before it is scored."""
    keep: int = 0
    """Candidates of a round that each look lets go on; 0 for one in `eta`."""
    eta: int = 2
    falsify: bool = False
    """Rescore what is kept before it is revised: the falsifier may have grown the train set."""

    @property
    def num_expansions(self) -> int:
        """Nodes that are revised at most, by either strategy."""
        return self.depth * self.width


class Step(NamedTuple):
    """What the search would like to know."""

    action: Action
    node: int
    look: int = 0
    """Which of the looks, from 0."""


@dataclass
class Node:
    """A candidate, and what became of it."""

    node: int
    kind: Kind
    parent: int | None
    depth: int
    explanation: Explanation | None = None
    status: str = "proposed"
    """proposed, looking or scoring on the way; then ok, duplicate, pruned, or why there is no score."""
    looks: list[float | None] = field(default_factory=list)
    """What the cheap looks gave."""
    train_score: float | None = None
    """On the train set as it was when the node was scored last."""
    valid_score: float | None = None
    final_score: float | None = None
    """Of a finalist: on a valid set that holds what sounds like any of them."""
    thought: str | None = None
    """Raw answer of the LLM."""
    feedback: str | None = None
    """What an explainer is told about this node when it revises it."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None


_STEP_OF: dict[str, Action] = {"proposed": "propose", "looking": "look", "scoring": "score"}


@dataclass
class TreeSearch:
    """The search of one feature."""

    settings: SearchSettings
    nodes: list[Node] = field(default_factory=list)
    frontier: list[int] = field(default_factory=list)
    """Nodes that may be revised next, best first."""
    to_rescore: list[int] = field(default_factory=list)
    round_start: int = 0
    """First node of the round."""
    round: int = 0
    """Rounds of revision begun."""
    falsified: bool = False
    """Whether the frontier of this round has been rescored."""
    finished: bool = False
    cut_by: str | None = None
    """`budget` or `time_limit`, where either ended it before its own end."""

    def ask(self) -> list[Step]:
        """Steps that wait for an answer; begins the next round when there are none. Empty when the search is over.

        Asking twice without telling gives the same steps.
        """
        if not self.nodes:
            self._add("lexical", None, int(self.settings.lexical_root))
            self._add("llm", None, self.settings.num_llm_roots)
        while not self.finished:
            steps = self._steps()
            if steps:
                return steps
            self._advance()
        return []

    def explained(
        self,
        node: int,
        explanation: Explanation | None,
        status: str = "ok",
        *,
        thought: str | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cost_usd: float | None = None,
    ) -> None:
        """Takes a proposal's answer; None with a status where none could be had. Equal candidates count once."""
        told = self._told(node, "proposed")
        told.thought, told.cost_usd = thought, cost_usd
        told.prompt_tokens, told.completion_tokens = prompt_tokens, completion_tokens
        if explanation is None:
            told.status = status
            return
        told.status = "duplicate" if any(n.explanation == explanation for n in self.nodes) else self._after_look(0)
        told.explanation = explanation

    def looked(self, node: int, score: float | None) -> None:
        """Takes what a cheap look gave; None comes after every number."""
        told = self._told(node, "looking")
        told.looks.append(score)
        told.status = "looked"

    def scored(self, node: int, train_score: float | None, valid_score: float | None, feedback: str | None) -> None:
        """Takes a candidate's scores; without one on train it takes no further part."""
        told = self._told(node, "scoring")
        told.train_score, told.valid_score, told.feedback = train_score, valid_score, feedback
        told.status = "ok" if train_score is not None else "undefined"

    def rescored(self, node: int, train_score: float | None, feedback: str | None) -> None:
        """Takes a kept candidate's score on the train set as it is now."""
        assert node in self.to_rescore, f"node {node} is not to be rescored"
        self.to_rescore.remove(node)
        self.nodes[node].train_score, self.nodes[node].feedback = train_score, feedback
        if not self.to_rescore:
            self.falsified = True

    def stop(self, reason: str) -> None:
        """Ends the search after what has been told; `reason` is kept as `cut_by`."""
        self.finished, self.cut_by = True, reason
        for node in self.nodes:
            if node.status in _STEP_OF or node.status == "looked":
                node.status = "stopped"

    def kept(self) -> list[Node]:
        """What the falsifier should attack: the best `width` nodes of the frontier."""
        return [self.nodes[node] for node in self.frontier[: self.settings.width]]

    def finalists(self, count: int) -> list[Node]:
        """The best on valid; the earlier ones of equals."""
        scored = [node for node in self.nodes if node.valid_score is not None]
        return sorted(scored, key=lambda node: (-(node.valid_score or 0.0), node.node))[:count]

    def winner(self) -> Node | None:
        """The finalist with the best final score, or without any the node with the best valid score; the earlier one
        of equals; None where no node has a score."""
        judged = [node for node in self.nodes if node.final_score is not None]
        if not judged:
            return next(iter(self.finalists(1)), None)
        return max(judged, key=lambda node: (node.final_score, -node.node))

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
        return {**vars(self), "settings": self.settings._asdict(), "nodes": nodes}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> TreeSearch:
        """The search that `state` describes."""
        nodes = [
            Node(**{**node, "explanation": from_json(node["explanation"]) if node["explanation"] else None})
            for node in state["nodes"]
        ]
        return cls(**{**state, "settings": SearchSettings(**state["settings"]), "nodes": nodes})

    def _told(self, node: int, status: str) -> Node:
        told = self.nodes[node]
        assert told.status == status, f"node {node} is {told.status}, not {status}: it has been told already"
        return told

    def _steps(self) -> list[Step]:
        for status, action in _STEP_OF.items():
            nodes = [node for node in self.nodes[self.round_start :] if node.status == status]
            if nodes:
                return [Step(action, node.node, len(node.looks)) for node in nodes]
        return [Step("rescore", node) for node in self.to_rescore]

    def _after_look(self, looks: int) -> str:
        return "looking" if looks < self.settings.num_looks else "scoring"

    def _add(self, kind: Kind, parent: int | None, count: int) -> None:
        depth = 0 if parent is None else self.nodes[parent].depth + 1
        for _ in range(count):
            self.nodes.append(Node(len(self.nodes), kind, parent, depth))

    def _advance(self) -> None:
        """All that was asked has been told."""
        looked = [node for node in self.nodes[self.round_start :] if node.status == "looked"]
        if looked:
            self._prune(looked)
            return
        if not self.falsified:
            self._set_frontier()
            if self.settings.falsify and self._may_go_on():
                self.to_rescore = list(self.frontier)
                return
        before = list(self.frontier)
        self._rank()
        best = self.nodes[self.frontier[0]].train_score if self.frontier else None
        nothing_new = not any(node >= self.round_start for node in before) and self.settings.strategy == "beam"
        if not self._may_go_on() or best is None or best >= self.settings.stop_score or nothing_new:
            self.finished = True
            return
        self._expand()

    def _prune(self, looked: list[Node]) -> None:
        keep = self.settings.keep or -(-len(looked) // self.settings.eta)
        ranked = sorted(looked, key=lambda n: (n.looks[-1] is None, -(n.looks[-1] or 0.0), n.node))
        for place, node in enumerate(ranked):
            node.status = self._after_look(len(node.looks)) if place < keep else "pruned"

    def _set_frontier(self) -> None:
        """Joins the round's nodes to those kept before them."""
        self.frontier += [node.node for node in self.nodes[self.round_start :] if node.status == "ok"]
        self._rank()
        if self.settings.strategy == "beam":
            del self.frontier[self.settings.width :]

    def _rank(self) -> None:
        scores = {node: self.nodes[node].train_score for node in self.frontier}
        defined = [node for node, score in scores.items() if score is not None]
        self.frontier = sorted(defined, key=lambda node: (-scores[node], node))  # type: ignore[operator]

    def _may_go_on(self) -> bool:
        rounds = self.settings.depth if self.settings.strategy == "beam" else self.settings.num_expansions
        return bool(self.frontier) and self.round < rounds

    def _expand(self) -> None:
        self.round, self.round_start, self.falsified = self.round + 1, len(self.nodes), False
        parents = list(self.frontier)
        if self.settings.strategy == "best_first":
            parents = [self.frontier.pop(0)]
        for node in parents:
            self._add("revision", node, self.settings.branching_factor)
