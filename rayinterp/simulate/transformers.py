"""The simulator engine for any Hugging Face causal LM: log-probabilities of the digits 0 to 5 at every token.

    header   task and worked examples           computed once, its KV cache shared by every pass
    rule     "The detector responds to: ..."    once per rule and pass
    record   token <tab> unknown <newline> ...  read at the tabs

It also gives the losses of texts behind a description, with the model's own head, for the scorer `surprisal`.

Imports torch and transformers alone (and modules of this package that do the same), so that it runs on a bare GPU
machine. It knows nothing of tables, configs or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rayinterp.errors import UserError
from rayinterp.prompts import surprisal_prefix
from rayinterp.simulate import prompt_tree
from rayinterp.simulate.prompt_tokens import PromptTokens, Record
from rayinterp.simulate.prompt_tree import Branch, TreePlan
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, Calibration, RuleRequest, simulate_with
from rayinterp.subject import Quantization, load_language_model, pick_device, pick_dtype

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Float32, Int64


class DigitHead(torch.nn.Module):
    """The rows of an LM head that belong to the six digits, multiplied in float32.

    It takes the place of the model's own head, so that the model applies to it whatever it applies to that one:
    soft-capping, a scale, a bias.
    """

    def __init__(self, head: torch.nn.Module, digit_ids: list[int]) -> None:
        super().__init__()
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, torch.Tensor) and weight.is_floating_point(), f"quantised head {type(head)}"
        self.weight = torch.nn.Parameter(weight.detach()[digit_ids].float(), requires_grad=False)
        self.bias = None
        if isinstance(bias, torch.Tensor):
            self.bias = torch.nn.Parameter(bias.detach()[digit_ids].float(), requires_grad=False)

    def forward(self, hidden: Float[torch.Tensor, "*batch d_model"]) -> Float32[torch.Tensor, "*batch 6"]:
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


class Header(NamedTuple):
    """What stands before everything else of a pass: read once."""

    length: int
    kv: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values, by layer."""


class TransformersSimulator:
    """A language model that rates every token of a sequence for a rule.

    Args:
        model: Hugging Face name or local folder.
        revision: Commit of the model.
        dtype: `float32`, `bfloat16`, or `auto`: bfloat16 where the hardware has it.
        device: `cuda`, `cpu` or `auto`.
        quantization: By bitsandbytes.
        attn_implementation: `eager`, `sdpa` or `flex_attention` (for CUDA: it skips what may not be seen); the model's
            own choice where None.
        calibration: Used by `simulate`; `log_probs` are never calibrated.
        num_few_shots: Worked examples in the header.
        token_budget: Tokens in one pass, the header not counted.

    Raises:
        UserError: the model or its tokenizer cannot be used; the message lists all that failed.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        quantization: Quantization = "none",
        attn_implementation: str | None = None,
        calibration: Calibration = "difference",
        num_few_shots: int = 3,
        token_budget: int = 2048,
    ) -> None:
        self._device = pick_device(device)
        self._dtype = pick_dtype(dtype, self._device)
        self._calibration: Calibration = calibration
        self._token_budget = token_budget
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        self._prompt = PromptTokens(tokenizer, num_few_shots)
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self._model = load_language_model(
            AutoModelForCausalLM, model, revision, self._dtype, self._device, quantization, **options
        )
        prompt_tree.check_model(self._model)
        prompt_tree.check_length(self._model, self.header_length)
        head = self._model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"simulator model {model!r} ({type(self._model).__name__}) has no LM head to read digits from"
            )
        self._heads = DigitHead(head, self._prompt.digit_ids), head
        self._model.set_output_embeddings(self._heads[0])
        self._header = self._read_header(self._prompt.header)
        self._rating_header: Header | None = None
        self._nulls: dict[tuple[str, tuple[str, ...]], Float32[np.ndarray, "seq 6"]] = {}

    @property
    def header_length(self) -> int:
        """Tokens of task and worked examples, which every pass attends to."""
        return len(self._prompt.header)

    def simulate(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Calibrated predictions, as `Simulator` asks for."""
        return simulate_with(self._log_probs_nulls_once, requests, self._calibration)

    @torch.inference_mode()
    def log_probs(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq 6"]]]:
        """Raw log-probabilities among the digits 0 to 5: for each request, one [seq, 6] array per sequence."""
        records = [[self._prompt.record(sequence.tokens) for sequence in request.sequences] for request in requests]
        branches = [
            Branch(self._prompt.rule(request.rule), [record.ids for record in of_request])
            for request, of_request in zip(requests, records, strict=True)
        ]
        self._check_lengths(branches)
        answers: list[list[Any]] = [[None] * len(request.sequences) for request in requests]
        for plan in prompt_tree.plan_passes(branches, self._token_budget):
            for leaf, values in zip(plan.leaves, self._run(plan, records, self._header), strict=True):
                answers[leaf.branch][leaf.record] = values
        return answers

    @torch.inference_mode()
    def rate(self, texts: list[str]) -> list[Float32[np.ndarray, "6"]]:
        """How abstract each text is: log-probabilities among the digits 0 to 5, read at the tab behind it."""
        if self._rating_header is None:
            self._rating_header = self._read_header(self._prompt.rating_header())
        records = [self._prompt.record((text,)) for text in texts]
        branch = Branch([], [record.ids for record in records])
        longest = max((len(record.ids) for record in records), default=0)
        prompt_tree.check_length(self._model, self._rating_header.length + longest)
        answers: list[Any] = [None] * len(texts)
        for plan in prompt_tree.plan_passes([branch], self._token_budget):
            for leaf, values in zip(plan.leaves, self._run(plan, [records], self._rating_header), strict=True):
                (answers[leaf.record],) = values
        return answers

    def _run(self, plan: TreePlan, records: list[list[Record]], header: Header) -> list[Float32[np.ndarray, "seq 6"]]:
        """One pass behind a header; log-probabilities of each of its records."""
        tree = prompt_tree.pack(plan.segments, header.length)
        logits = self._model(
            input_ids=tree.ids[None].to(self._device),
            position_ids=tree.position_ids[None].to(self._device),
            attention_mask=prompt_tree.attention_masks(self._model, tree, header.length, self._dtype, self._device),
            past_key_values=DynamicCache(header.kv),  # shares the header's tensors, and grows without them
            use_cache=True,
        ).logits[0]
        reads = [records[leaf.branch][leaf.record].reads for leaf in plan.leaves]
        rows = [
            tree.starts[leaf.segment] + read
            for leaf, of_leaf in zip(plan.leaves, reads, strict=True)
            for read in of_leaf
        ]
        values = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(-1).cpu()
        return [part.numpy() for part in values.split([len(of_leaf) for of_leaf in reads])]

    @torch.inference_mode()
    def token_losses(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "tokens"]]]:
        """Negative log-likelihoods, in nats, of every token of a text behind a description of it.

        A rule stands for the description (`prompts.surprisal_prefix`); a text is that of its sequence's tokens in the
        simulator's own tokenisation. For each request one array per sequence.
        """
        texts = [[self._prompt.text(sequence.tokens) for sequence in request.sequences] for request in requests]
        branches = [
            Branch(self._prompt.prefix(surprisal_prefix(request.rule)), of_request)
            for request, of_request in zip(requests, texts, strict=True)
        ]
        self._check_lengths(branches, header_length=0)
        answers: list[list[Any]] = [[None] * len(request.sequences) for request in requests]
        with self._whole_head():
            for plan in prompt_tree.plan_passes(branches, self._token_budget):
                for leaf, values in zip(plan.leaves, self._losses(plan), strict=True):
                    answers[leaf.branch][leaf.record] = values
        return answers

    def _losses(self, plan: TreePlan) -> Iterator[Float32[np.ndarray, "tokens"]]:
        """One pass without the header; losses of each of its texts."""
        tree = prompt_tree.pack(plan.segments, 0)
        logits = self._model(
            input_ids=tree.ids[None].to(self._device),
            position_ids=tree.position_ids[None].to(self._device),
            attention_mask=prompt_tree.attention_masks(self._model, tree, 0, self._dtype, self._device),
            past_key_values=DynamicCache(),
            use_cache=True,
        ).logits[0]
        for leaf in plan.leaves:
            ids, parent = plan.segments[leaf.segment]
            before = tree.starts[parent] + len(plan.segments[parent].ids) - 1
            start = tree.starts[leaf.segment]
            # A token is read where the one before it stands, the first where the description ends.
            rows = torch.tensor([before, *range(start, start + len(ids) - 1)][: len(ids)], device=logits.device)
            # A text at a time: a whole pass in float32 would be gigabytes with a vocabulary of 256,000.
            losses = torch.nn.functional.cross_entropy(
                logits[rows].float(), torch.tensor(ids, device=logits.device), reduction="none"
            )
            yield losses.cpu().numpy()

    @contextmanager
    def _whole_head(self) -> Iterator[None]:
        """The model's own head in place of the digits' rows."""
        digits, whole = self._heads
        self._model.set_output_embeddings(whole)
        try:
            yield
        finally:
            self._model.set_output_embeddings(digits)

    def _check_lengths(self, branches: list[Branch], header_length: int | None = None) -> None:
        longest = max((len(b.rule) + max(map(len, b.records), default=0) for b in branches), default=0)
        prompt_tree.check_length(
            self._model, (self.header_length if header_length is None else header_length) + longest
        )

    @torch.inference_mode()
    def _read_header(self, header: list[int]) -> Header:
        """What every pass behind it attends to."""
        # Without the model's config, or layers with a sliding window would keep only the end of the header.
        cache = DynamicCache()
        ids: Int64[torch.Tensor, "1 header"] = torch.tensor([header], device=self._device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return Header(len(header), [(layer.keys, layer.values) for layer in cache.layers])  # type: ignore[attr-defined]

    def _log_probs_nulls_once(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq 6"]]]:
        """`log_probs`, which remembers what null explanations gave: it depends on the sequence alone."""
        fresh = [
            request._replace(
                sequences=tuple(s for s in request.sequences if (request.rule, s.tokens) not in self._nulls)
            )
            for request in requests
        ]
        answers = []
        for request, new, values in zip(requests, fresh, self.log_probs(fresh), strict=True):
            if request.rule in NULL_EXPLANATIONS:
                self._nulls.update(((new.rule, s.tokens), v) for s, v in zip(new.sequences, values, strict=True))
                values = [self._nulls[request.rule, sequence.tokens] for sequence in request.sequences]
            answers.append(values)
        return answers
