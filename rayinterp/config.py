"""What a run is: one frozen model per stage, read from YAML with `key.path=value` overrides.

The sections `seed` and `subject` to `records` are *upstream*: every explainer and simulator shares the tables that
they give, so they are fixed once a run directory holds tables (`freeze`). Explainers, simulators and LLMs are named
arms; `arm_id` names an arm in the tables by its name and a hash of its content. `resources` says how a stage is
spread over machines, `budget` what it may spend; neither changes what it computes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rayinterp.errors import UserError

Source = Literal[
    "random",
    "random_negative",
    "similar",
    "similar_negative",
    "similar_projected",
    "similar_projected_negative",
    "neighbour",
]
Dtype = Literal["auto", "float32", "bfloat16"]
Calibration = Literal["none", "difference", "ratio"]
AnswerFormat = Literal["text", "json_object", "json_schema"]

LANGUAGE = "planted/language"
PLANTED = ("planted", LANGUAGE)
"""Subjects, and their corpora, whose features are known."""
UPSTREAM = ("seed", "subject", "corpus", "harvest", "index", "records")
"""Sections that are fixed per run directory."""
NOT_FROZEN = ("subject.device", "subject.device_map", "subject.compile", "subject.max_variance_unexplained")
"""Fields in them that change no table."""


def without_secret(url: str) -> str:
    """The address as it is, if nothing in it is secret: it goes into run.yaml, logs, reports and error messages.

    Raises:
        ValueError: it has a password or a query; what is refused is not repeated.
    """
    for part in url.split("::"):
        scheme, sign, rest = part.partition("://")
        _, at, _ = rest.split("/")[0].rpartition("@")
        before, _, _ = rest.rpartition("@")  # a password may have a slash in it
        # A user alone names a container in some stores; on the web it may be a token.
        if sign and ("?" in rest or ":" in before or (at and scheme.startswith("http"))):
            raise ValueError(
                f"holds a password or a query ({scheme}://...), which would end up in run.yaml and logs; leave it out, "
                "and give keys the way that the storage's own tools read them: its environment variables or profile"
            )
    return url


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class FeatureRange(_Section):
    start: int = Field(ge=0)
    """First feature."""
    stop: int = Field(gt=0)
    """One past the last feature."""


class SaeConfig(_Section):
    """SAEs of one release or one folder, one per layer."""

    release: str | None = None
    """sae-lens release, e.g. `gemma-scope-9b-pt-res-canonical`; leave out for local folders."""
    sae_id: str
    """Id within the release, or a folder; `{layer}` stands for the layer's number."""
    layers: Literal["all", "even", "odd"] | list[int]
    """Layers of the subject model to harvest."""
    name: str = "layer_{layer}"
    """The SAE's name in feature ids."""

    @model_validator(mode="after")
    def _layers_differ(self) -> SaeConfig:
        if not self.layers:
            raise ValueError("layers is empty; name one at least")
        if isinstance(self.layers, str) or len(set(self.layers)) > 1:
            for field, value in (("sae_id", self.sae_id), ("name", self.name)):
                if "{layer}" not in value:
                    raise ValueError(f"{field} is {value!r} for several layers; put {{layer}} where they differ")
        return self


class SubjectConfig(_Section):
    model: str
    """Hugging Face name or local folder of the subject model; `embedded/...`, `planted` and
    `planted/language` need no network."""
    revision: str | None = None
    """Commit of the model, so that a run can be repeated."""
    dtype: Dtype = "auto"
    """Precision of the model; auto takes bfloat16 where the hardware has it."""
    sae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the SAEs."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention kernel; left out, transformers chooses."""
    device_map: str | None = None
    """As in transformers, e.g. auto: spreads a model that is too large for one GPU over the GPUs of an actor."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """bitsandbytes quantization of the model."""
    compile: bool = False
    """`torch.compile` the layers: pays on GPUs, for runs of many minutes."""
    saes: SaeConfig
    """The SAEs."""
    features: Literal["all"] | int | list[int] | FeatureRange = 16
    """Features per SAE: a number draws a seeded sample; or a list, a range, or all."""
    prepend_bos: Literal["auto"] | bool = "auto"
    """Put BOS in front of every sequence; auto asks the SAE's metadata. BOS never counts as an activation."""
    max_variance_unexplained: float = Field(default=0.5, gt=0)
    """Harvest stops above this share on its first batch: the wrong hook point, model or normalisation."""


class CorpusConfig(_Section):
    dataset: Annotated[str, AfterValidator(without_secret)]
    """Hugging Face dataset, local file or folder (jsonl[.zst|.gz], parquet, txt), a URL (`s3://`, `gs://`, `hf://`) of
    such a folder, `embedded`, or `planted` and `planted/language` for the subjects of these names."""
    reader: Literal["files", "datasets"] = "files"
    """files: the dataset's data files as they are; datasets: through Hugging Face datasets, streaming."""
    revision: str | None = None
    """Commit of a Hugging Face dataset, so that a run can be repeated."""
    hf_config: str | None = None
    """Configuration of a dataset that is read through datasets."""
    hf_split: str = "train"
    """Its split."""
    files: str | None = None
    """Glob of input files within the dataset, e.g. `train/*.jsonl.zst`; by default all that can be read."""
    text_field: str = "text"
    """Where a document's text is; dots go into nested fields."""
    subset_field: str = "meta.pile_set_name"
    """Where the name of the document's subset is."""
    sequence_length: int = Field(default=32, ge=8, le=2048)
    """Text tokens per sequence, BOS not counted."""
    num_sequences: int = Field(default=100_000, gt=0)
    """Sequences in all, shared evenly between the input files."""
    max_sequences_per_document: int = Field(default=16, gt=0)
    """So that no long document dominates."""
    ascii_only: bool = True
    """Skip windows with characters beyond ASCII, as the reference does."""
    splits: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Shares of train, valid and test documents."""
    shard_size: int = Field(default=1024, gt=0)
    """Sequences per shard: the unit of work and of resumption."""

    @model_validator(mode="after")
    def _hub_options_need_their_reader(self) -> CorpusConfig:
        if self.reader == "files" and (self.hf_config is not None or self.hf_split != "train"):
            raise ValueError("hf_config and hf_split take effect with reader: datasets alone; set it, or remove them")
        if self.reader == "datasets" and self.files is not None:
            raise ValueError("files takes effect with reader: files alone; set it, or remove files")
        return self

    @model_validator(mode="after")
    def _splits_add_up(self) -> CorpusConfig:
        if min(self.splits) <= 0 or abs(sum(self.splits) - 1) > 1e-6:
            raise ValueError(f"splits is {list(self.splits)}; give three shares above 0 that add up to 1")
        return self


class HarvestConfig(_Section):
    token_budget: int = Field(default=4096, gt=0)
    """Tokens per forward pass: as many sequences as fit, at least one. A batch never crosses a shard, so results do not
    depend on the workers."""
    min_sequences: int = Field(default=20, gt=0)
    """A feature active in fewer train sequences is `too_few`."""
    max_density: float = Field(default=0.2, gt=0, le=1)
    """A feature active at a larger share of all tokens is `dense`."""
    num_top: int = Field(default=100, gt=0)
    """Top sequences kept per feature."""


class IndexConfig(_Section):
    embedder: str = "sentence-transformers/all-mpnet-base-v2"
    """Sentence encoder: Hugging Face name, folder, or `embedded/minilm-l6`."""
    batch_size: int = Field(default=64, gt=0)
    """Texts per forward pass."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage of the vectors."""
    search: Literal["auto", "exact", "index"] = "auto"
    """exact: every query against every vector, in one pass for many queries; index: an approximate index, with exact
    re-ranking; auto: exact below `exact_below` vectors."""
    exact_below: int = Field(default=5_000_000, gt=0)
    """Vectors from which `auto` takes the index."""
    kind: Literal["IVF_PQ", "IVF_HNSW_SQ", "IVF_FLAT"] = "IVF_PQ"
    """Kind of the index, where one is used."""

    def uses_index(self, num_vectors: int) -> bool:
        return self.search == "index" or (self.search == "auto" and num_vectors >= self.exact_below)


class SplitQuota(_Section):
    positive: int = Field(ge=0)
    """Records on which the feature is active."""
    complementary: int = Field(ge=0)
    """Records of each complementary source."""


class RecordsConfig(_Section):
    positive: Literal["top", "quantile", "mix"] = "mix"
    """How positives are chosen: highest maxima, spread over the quantiles, or half and half."""
    complementary: tuple[Source, ...] = ("similar_negative", "random_negative")
    """Complementary sources, each drawn on its own."""
    holistic: Literal["none", "positive", "all"] = "none"
    """Records whose holistic activations are computed: the fall of the mean activation as each token is dropped."""
    holistic_splits: tuple[Literal["train", "valid", "test"], ...] = ("train",)
    """Splits in which they are."""
    num_query_positives: int = Field(default=400, gt=0)
    """Train positives whose mean embedding is the query for similar records."""
    train: SplitQuota = SplitQuota(positive=10, complementary=10)
    valid: SplitQuota = SplitQuota(positive=10, complementary=10)
    test: SplitQuota = SplitQuota(positive=30, complementary=30)


class LLMConfig(_Section):
    """An LLM that writes: an endpoint that speaks the OpenAI protocol, or a model of our own served by Ray."""

    provider: Literal["openai", "local", "scripted", "planted"]
    """openai: any compatible endpoint; local: a Hugging Face model in a Ray Serve replica; scripted: `answers`;
    planted: for the subject `planted/language`."""
    model: str
    """The endpoint's name for the model; a Hugging Face name, folder or `embedded/...`; of the planted ones `blind`,
    which guesses, `truth` or `broad`."""
    answers: dict[str, str] = {}
    """What a scripted LLM answers, by feature id: for tests and dry runs."""
    base_url: str | None = None
    """Endpoint, without a query or a user: what is secret goes into the environment. The openai package's default where
    left out."""
    answer_format: AnswerFormat = "text"
    """How an endpoint is told the form of structured answers. text: by the prompt alone; json_object: any JSON object;
    json_schema: rules and nothing else. A local model is always held to the form."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Keys are never written to a config."""
    dtype: Dtype = "auto"
    """Precision of a local model."""
    device: str = "auto"
    """Where a local model runs."""
    timeout_seconds: float = Field(default=120, gt=0)
    """Per attempt."""
    max_retries: int = Field(default=6, ge=0)
    """Of connection errors, timeouts, rate limits and 5xx answers, half a second to 8 s apart or as the endpoint says;
    anything else is not retried."""
    max_concurrency: int = Field(default=32, gt=0)
    """Calls under way at once in the whole run; each search actor may make at least one."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Calls begun in a minute in the whole run, at even distances; retries come on top."""
    usd_per_million_prompt_tokens: float | None = None
    """Price; without it the cost is null."""
    usd_per_million_completion_tokens: float | None = None
    """Price; without it the cost is null."""
    max_calls: int | None = None
    """Calls that explainers may make, and each further scorer again; features beyond it get the status no_budget."""

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, base_url: str | None) -> str | None:
        if base_url is not None and ("?" in base_url or "@" in base_url):
            raise ValueError("has a query or a user, where keys end up in logs; give the key by api_key_env")
        return base_url

    @model_validator(mode="after")
    def _planted_model_exists(self) -> LLMConfig:
        if self.provider == "planted" and self.model not in ("blind", "truth", "broad"):
            raise ValueError(f"model is {self.model!r}; where provider is 'planted' it is blind, truth or broad")
        return self

    @model_validator(mode="after")
    def _format_is_an_endpoints(self) -> LLMConfig:
        if self.answer_format != "text" and self.provider != "openai":
            raise ValueError(
                f"answer_format is {self.answer_format!r}, which endpoints alone are told; leave it out where provider "
                f"is {self.provider!r}"
            )
        return self


class LexicalConfig(_Section):
    """Rules from the tokens that tell active from silent train records: no LLM."""

    method: Literal["lexical"] = "lexical"
    rule_cap: int = Field(default=5, ge=1, le=10)
    """Rules at most."""
    simulator: str
    """Simulator arm that scores it on train and valid."""


class OneShotConfig(_Section):
    """One LLM call per feature."""

    method: Literal["one_shot"] = "one_shot"
    llm: str
    """LLM that writes."""
    simulator: str
    """Simulator arm that scores it on train and valid."""
    structured: bool = True
    """Rules with strengths, or one sentence."""
    rule_cap: int = Field(default=5, ge=1, le=10)
    """Rules at most."""
    few_shots: bool = True
    """Show a worked example first. A very small model copies it; leave it out there."""
    num_records_shown: int = Field(default=10, gt=0)
    """Train positives in the prompt."""
    num_negatives_shown: int = Field(default=0, ge=0)
    """Train complementary records in the prompt, as texts on which the feature is silent; those on which it is not are
    passed over."""
    holistic: bool = False
    """Show the tokens of each text without which the feature would fire less; `records.holistic` computes them."""
    temperature: float = Field(default=1.2, ge=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=512, gt=0)
    """Length of an answer."""
    max_parse_retries: int = Field(default=1, ge=0)
    """Further attempts after an answer that does not parse."""


class CascadeConfig(_Section):
    """A cheap simulator looks first, and only what it likes best goes to the arm's own."""

    simulator: str
    """Simulator arm that looks first: late interaction, as a rule."""
    keep: int = Field(gt=0)
    """Candidates of each round that go on; the others get the status pruned."""
    audit: float = Field(default=0.1, ge=0, le=1)
    """Share of features, a seeded sample, on which all go on, so that the agreement of the two can be measured."""


class HalvingConfig(_Section):
    """Successive halving: a round's candidates are scored on few records first; of each look one in `eta` goes on."""

    simulator: str | None = None
    """Simulator arm of the looks, a cheap one; the arm's own where left out."""
    num_looks: int = Field(default=2, gt=0)
    """Looks before the real score."""
    eta: int = Field(default=2, gt=1)
    """One candidate in so many goes on from a look; the next look has so many times the records."""
    num_records: int = Field(default=6, gt=1)
    """Train records of the first look, half of them positives."""


class FalsifierConfig(_Section):
    """Each round, silent train sequences that sound like the kept candidates join the search's train set."""

    num_drawn: int = Field(default=10, gt=0)
    """Sequences, nearest to a candidate's own words, on which it is tried."""
    num_added: int = Field(default=2, ge=0)
    """Of all that were drawn in a round, so many that are predicted most wrongly are added; all candidates in the
    running are then scored again. 0: nothing is drawn, the finalists alone are attacked."""
    num_finalists: int = Field(default=4, ge=0)
    """Before the winner is chosen, so many of the best on valid are attacked there too: silent valid sequences that
    sound like any of them join valid, for all of them. 0 leaves valid as it is."""
    num_valid: int = Field(default=5, gt=0)
    """Valid sequences drawn for each finalist."""


class TreeConfig(OneShotConfig):
    """Tree search: roots, then rounds of revision guided by the simulator."""

    method: Literal["tree"] = "tree"  # type: ignore[assignment]
    strategy: Literal["beam", "best_first", "successive_halving"] = "beam"
    """beam: a round revises the best `width` nodes; best_first: the best node not revised yet, `width * depth` times;
    successive_halving: the beam, where a round's candidates are thinned out by cheap looks."""
    num_llm_roots: int = Field(default=3, ge=0)
    """One-shot explanations that the search begins with."""
    lexical_root: bool = True
    """Also begin with the lexical explanation."""
    branching_factor: int = Field(default=2, gt=0)
    """Revisions asked for per node."""
    width: int = Field(default=3, gt=0)
    """Nodes kept per round."""
    depth: int = Field(default=3, ge=0)
    """Rounds."""
    stop_score: float = Field(default=0.9, gt=0, le=1)
    """A train score that ends the search."""
    num_worst_records: int = Field(default=1, gt=0)
    """Records shown in feedback: those whose removal would raise the score most."""
    time_limit_seconds: float = Field(default=1500, gt=0)
    """Per feature."""
    cascade: CascadeConfig | None = None
    """Spares the simulator candidates that a cheaper one thinks little of."""
    halving: HalvingConfig = HalvingConfig()
    """How successive_halving goes about it."""
    falsifier: FalsifierConfig | None = None
    """Attacks what is kept, each round; left out, the train set stays as it is."""

    @model_validator(mode="after")
    def _looks_once(self) -> TreeConfig:
        if self.cascade and self.strategy == "successive_halving":
            raise ValueError("cascade and strategy successive_halving are two ways to look first; take one of them out")
        return self


ExplainerConfig = Annotated[LexicalConfig | OneShotConfig | TreeConfig, Field(discriminator="method")]


class LateInteractionConfig(_Section):
    """No LLM: each token's contextual vector against the vectors of the rule's words."""

    engine: Literal["late_interaction"] = "late_interaction"
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder whose token vectors are compared."""
    version: Literal[2] = 2
    """Of the method: what another one simulated has another name in the tables."""
    batch_size: int = Field(default=64, gt=0)
    """Sequences per forward pass."""
    num_features: int | None = None
    """Features per SAE that the score stage grades with it; null for all."""


class LLMSimulatorConfig(_Section):
    """An LLM that reads the rule and rates every token; predictions come from its digit logits."""

    model: str
    """Any Hugging Face causal LM, or `embedded/...`."""
    revision: str | None = None
    """Commit of the model."""
    calibration: Calibration = "difference"
    """What the simulator believes before it reads the rule is taken off this way."""
    num_few_shots: int = Field(default=3, ge=1)
    """Worked examples in the header, which every pair shares."""
    num_features: int | None = None
    """Features per SAE that the score stage grades with it; null for all."""
    max_records: int | None = Field(default=None, gt=0)
    """Test records per source that the score stage grades with it; null for all."""
    max_pairs: int | None = Field(default=None, gt=0)
    """(rule, record) pairs that the score stage may spend; features beyond it are not started."""


class TransformersSimulatorConfig(LLMSimulatorConfig):
    """The LLM in transformers: any model, CPU or GPU, packed prompts."""

    engine: Literal["transformers"] = "transformers"
    dtype: Dtype = "auto"
    """Precision."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """bitsandbytes quantization."""
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] | None = None
    """As in transformers, whose own choice is taken where left out; flex_attention skips what a packed prompt may not
    see, and is for CUDA."""
    token_budget: int = Field(default=2048, gt=0)
    """Tokens packed into one pass."""


class VllmSimulatorConfig(LLMSimulatorConfig):
    """The LLM in vLLM: one prompt a pair, what they begin with in common cached; for scale."""

    engine: Literal["vllm"] = "vllm"
    dtype: Dtype = "auto"
    """Precision."""
    quantization: str | None = None
    """As vLLM names it: fp8, awq, bitsandbytes, ...; left out, the model's own."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that one replica is spread over; `resources.simulator.num_gpus` must be the same."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that it may take, for weights and prefix cache together."""


class OracleConfig(_Section):
    """For the planted subject alone: knows what each planted rule means."""

    engine: Literal["oracle"] = "oracle"
    num_features: int | None = None
    """Features per SAE that the score stage grades with it; null for all."""


SimulatorConfig = Annotated[
    LateInteractionConfig | TransformersSimulatorConfig | VllmSimulatorConfig | OracleConfig,
    Field(discriminator="engine"),
]


class FurtherScorerConfig(_Section):
    """A score that needs no simulated activations (Paulo et al. 2024, Automatically Interpreting Millions of Features
    in Large Language Models); docs/scores.md says what each measures."""

    num_features: int | None = Field(default=None, gt=0)
    """Features per SAE; null for all."""
    max_records: int | None = Field(default=None, gt=0)
    """Test records per source; null for all."""


class JudgeConfig(FurtherScorerConfig):
    """An LLM is asked about test records, a few at a time."""

    llm: str
    """LLM that judges; its `max_calls` ends each scorer after the features that it suffices for."""
    num_shown: int = Field(default=5, gt=0)
    """Texts per question."""
    max_parse_retries: int = Field(default=1, ge=0)
    """Further attempts after an answer that does not parse, each told so."""
    temperature: float = Field(default=0, ge=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=100, gt=0)
    """Length of an answer; more for a model that thinks aloud."""


class DetectionConfig(JudgeConfig):
    """Does the text fit the explanation? Balanced accuracy."""

    method: Literal["detection"] = "detection"


class FuzzingConfig(JudgeConfig):
    """Does the explanation fit the tokens that are marked in the text? Balanced accuracy."""

    method: Literal["fuzzing"] = "fuzzing"


class IntruderConfig(JudgeConfig):
    """Which text does not belong with the others? No explanation is shown. Accuracy."""

    method: Literal["intruder"] = "intruder"
    num_shown: int = Field(default=5, gt=2)
    """Texts per question, the intruder among them."""


class SurprisalConfig(FurtherScorerConfig):
    """How much easier the explanation makes activating texts for a language model than silent ones. AUROC."""

    method: Literal["surprisal"] = "surprisal"
    simulator: str
    """Simulator arm with the engine transformers, whose model reads the texts; a base model, best of all."""


class EmbeddingConfig(FurtherScorerConfig):
    """How much closer the explanation lies to activating texts than to silent ones, for the index's encoder. AUROC."""

    method: Literal["embedding"] = "embedding"


ScorerConfig = Annotated[
    DetectionConfig | FuzzingConfig | IntruderConfig | SurprisalConfig | EmbeddingConfig, Field(discriminator="method")
]


class ComplexityConfig(_Section):
    simulator: str | None = None
    """Simulator arm (`engine: transformers`) whose LLM rates how abstract every rule is; null leaves the rating out.
    The other measures are always there."""


class ScoreConfig(_Section):
    simulators: tuple[str, ...]
    """Simulator arms that grade every explanation on test."""
    scorers: dict[str, ScorerConfig] = {}
    """Further scorers by name, each of which grades every explanation on test."""
    num_bootstrap: int = Field(default=1000, gt=0)
    """Resamples behind every interval."""
    num_rule_negatives: int = Field(default=10, ge=0)
    """Silent test sequences, nearest to an explanation's own words, that each explainer adds to what all of a feature's
    explanations are graded on (source `rule_negative`); 0 leaves the source out."""
    num_shuffled: int = Field(default=3, ge=0)
    """Other features whose explanations are graded on a feature as the shuffled control."""
    complexity: ComplexityConfig = ComplexityConfig()
    """How complex explanations are, beside how good."""


class StageResources(_Section):
    """How one stage is spread over the cluster."""

    num_actors: int = Field(default=1, gt=0)
    """Actors or replicas."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs each."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs each."""


class PoolResources(StageResources):
    """A stage whose actors take work from a queue: the pool may grow while the stage runs."""

    max_actors: int | None = Field(default=None, gt=0)
    """Actors at most; left out, as many as num_actors."""

    @model_validator(mode="after")
    def _grows(self) -> PoolResources:
        if self.max_actors is not None and self.max_actors < self.num_actors:
            raise ValueError(f"max_actors is {self.max_actors}, below num_actors ({self.num_actors})")
        return self

    @property
    def most_actors(self) -> int:
        return self.max_actors or self.num_actors


class ServiceResources(PoolResources):
    """Replicas of a model behind Ray Serve: a fixed number, or between num_actors and max_actors, by demand."""

    num_actors: int = Field(default=1, ge=0)
    """Replicas, or the fewest of them: 0 with max_actors lets a service that nobody asks go away."""
    target_ongoing: float = Field(default=8, gt=0)
    """Requests in hand per replica that the number of replicas is steered to."""
    upscale_seconds: float = Field(default=5, ge=0)
    """Demand must last so long before a replica is added."""
    idle_seconds: float = Field(default=120, ge=0)
    """And be gone so long before one is taken away."""
    timeout_seconds: float = Field(default=3600, gt=0)
    """A request that takes longer is given up: it waits while a replica starts, and behind other features'."""

    @model_validator(mode="after")
    def _somebody_answers(self) -> ServiceResources:
        if not self.most_actors:
            raise ValueError("num_actors is 0 and max_actors left out: nobody would answer; set one of them above 0")
        return self


class ResourcesConfig(_Section):
    """What each kind of worker is given, and how many there are."""

    address: str | None = None
    """Ray cluster to join; left out, the one that RAY_ADDRESS names, the one that `ray start` has left on this machine,
    or a new local one."""
    corpus: PoolResources = PoolResources()
    """Actors that cut texts into sequences."""
    harvest: PoolResources = PoolResources()
    """Subject models: of harvest, and of holistic activations in records."""
    index: PoolResources = PoolResources()
    """Sentence encoders: of index, of the falsifiers' retriever, of rule negatives and of the scorer embedding."""
    search: StageResources = StageResources(num_cpus=0.1)
    """Search actors of explain; in score, those that ask LLMs and simulators for further scores."""
    score: StageResources = StageResources(num_cpus=0.5)
    """Tasks that grade a block of features."""
    simulator: ServiceResources = ServiceResources(num_cpus=0.1)
    """Replicas of each simulator arm."""
    llm: ServiceResources = ServiceResources(num_cpus=0.1)
    """Replicas of each local LLM."""
    standing: tuple[str, ...] = ()
    """Simulator arms whose services runs of other directories share: found on the cluster or started there, and left
    standing."""
    searches_per_actor: int = Field(default=8, gt=0)
    """Features that one search actor works on at the same time."""
    max_outage_seconds: float = Field(default=600, ge=0)
    """An LLM endpoint may fail on everything for so long before the explain stage gives up."""
    gpu_tflops: float = Field(default=312, gt=0)
    """Peak bf16 TFLOP/s of one GPU, dense, for `rayinterp plan`; by default that of an A100."""


class BudgetConfig(_Section):
    """What a run may spend, over all of its resumptions; raise it and run again to go on.

    Stages up to records stop with what is finished kept, explain begins no further feature, nor does a further scorer
    that asks an LLM; the rest of score, and report, are never withheld."""

    max_usd: float | None = Field(default=None, ge=0)
    """Dollars: LLM calls by their price, and GPU-hours where `usd_per_gpu_hour` is given."""
    max_gpu_hours: float | None = Field(default=None, ge=0)
    """GPUs held, busy or not, times hours."""
    max_hours: float | None = Field(default=None, ge=0)
    """Hours on the clock."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU-hour; without it GPUs cost no dollars."""


SECRET_NAME = re.compile(r"((KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?|(?<![A-Z])PASS)(?![A-Z])")
"""Of environment variables, in capitals: a word that ends so, and not one that goes on, as TOKENIZERS does."""


class JobConfig(_Section):
    """What travels with a run that is submitted to a cluster (`rayinterp submit`)."""

    working_dir: str = "."
    """The checkout whose code and configs the job runs; nodes get a copy. What git ignores stays here."""
    excludes: list[str] = []
    """More that stays here, as patterns of .gitignore; .rayignore has what always does."""
    extras: list[str] = []
    """Extras of rayinterp that nodes install before the job, at the versions of constraints.txt where it has them. vLLM
    wants other versions of its neighbours: give it an image."""
    image: str | None = None
    """Container image that holds code and configs; nothing else travels then. Nodes start it with podman, which the
    image of cluster/Dockerfile, itself a container, does not have; their GPUs are handed to it by CDI names."""
    env: dict[str, str] = {}
    """Environment variables of driver and workers. Keys are set on the nodes: Ray shows these to whoever may look."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if SECRET_NAME.search(name.upper()):
                raise ValueError(f"has {name}, which Ray would show on its dashboard; set it on the cluster's nodes")
            without_secret(value)
        return env

    @model_validator(mode="after")
    def _an_image_is_whole(self) -> JobConfig:
        if self.image and (self.extras or self.excludes):
            raise ValueError("image holds everything a job needs; leave out extras and excludes, or image")
        return self


class RunConfig(_Section):
    name: str = Field(min_length=1)
    """Shown in the report."""
    run_dir: Annotated[
        str,
        AfterValidator(without_secret),
        AfterValidator(lambda run_dir: run_dir if "://" in run_dir else str(Path(run_dir).expanduser())),
    ]
    """Where the tables, run.yaml, manifest.json and the report go: a path, `s3://...` or `gs://...`."""
    seed: int = 0
    """All chance of a run comes from here."""
    subject: SubjectConfig
    corpus: CorpusConfig
    harvest: HarvestConfig = HarvestConfig()
    index: IndexConfig = IndexConfig()
    records: RecordsConfig = RecordsConfig()
    llms: dict[str, LLMConfig] = {}
    """LLM arms by name."""
    simulators: dict[str, SimulatorConfig]
    """Simulator arms by name."""
    explainers: dict[str, ExplainerConfig]
    """Explainer arms by name."""
    score: ScoreConfig
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    job: JobConfig = JobConfig()

    @field_validator("llms", "simulators", "explainers")
    @classmethod
    def _names_are_plain(cls, arms: dict[str, Any]) -> dict[str, Any]:
        for name in arms:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"the name {name!r} ends up in file names and filters; use letters, digits, '_', '.' and '-'"
                )
        return arms

    @model_validator(mode="after")
    def _arms_exist(self) -> RunConfig:
        for name, explainer in self.explainers.items():
            _must_exist(f"explainers.{name}.simulator", explainer.simulator, self.simulators)
            if isinstance(explainer, TreeConfig) and (looks := looks_of(explainer)):
                _must_exist(f"explainers.{name}.{looks[0]}.simulator", looks[1], self.simulators)
            if isinstance(explainer, OneShotConfig):
                _must_exist(f"explainers.{name}.llm", explainer.llm, self.llms)
        for simulator in self.score.simulators:
            _must_exist("score.simulators", simulator, self.simulators)
        for simulator in self.resources.standing:
            _must_exist("resources.standing", simulator, self.simulators)
        for name, scorer in self.score.scorers.items():
            if isinstance(scorer, JudgeConfig):
                _must_exist(f"score.scorers.{name}.llm", scorer.llm, self.llms)
                if self.llms[scorer.llm].provider == "planted":
                    raise ValueError(
                        f"score.scorers.{name}.llm is {scorer.llm!r}, whose provider 'planted' explains and does not "
                        "judge; name another LLM"
                    )
            if isinstance(scorer, SurprisalConfig):
                _must_exist(f"score.scorers.{name}.simulator", scorer.simulator, self.simulators)
                if not isinstance(self.simulators[scorer.simulator], TransformersSimulatorConfig):
                    raise ValueError(
                        f"score.scorers.{name}.simulator is {scorer.simulator!r}, which gives no losses of texts; name "
                        "a simulator whose engine is transformers"
                    )
        if (rater := self.score.complexity.simulator) is not None:
            _must_exist("score.complexity.simulator", rater, self.simulators)
            engine = self.simulators[rater].engine
            if engine != "transformers":
                raise ValueError(
                    f"score.complexity.simulator is {rater!r}, whose engine is {engine}; a rating is read from the "
                    "logits of an LLM: name an arm with engine transformers, or null for no rating"
                )
        return self

    @model_validator(mode="after")
    def _prompts_have_their_parts(self) -> RunConfig:
        for name, explainer in self.explainers.items():
            if not isinstance(explainer, OneShotConfig):
                continue
            records = self.records
            if explainer.holistic and (records.holistic == "none" or "train" not in records.holistic_splits):
                raise ValueError(
                    f"explainers.{name}.holistic is true, but records.holistic is {records.holistic!r} with "
                    f"holistic_splits {list(records.holistic_splits)}; set records.holistic to 'positive' or 'all' and "
                    "have 'train' among records.holistic_splits, or leave explainers out that need them"
                )
            if explainer.num_negatives_shown and not (records.complementary and records.train.complementary):
                raise ValueError(
                    f"explainers.{name}.num_negatives_shown is {explainer.num_negatives_shown}, but train has no "
                    "complementary records; raise records.train.complementary and name sources in "
                    "records.complementary"
                )
        return self

    @model_validator(mode="after")
    def _dollars_can_be_counted(self) -> RunConfig:
        used = llms_used(self) | judges_used(self)
        for name in sorted(used & self.llms.keys()) if self.budget.max_usd is not None else []:
            llm = self.llms[name]
            prices = (llm.usd_per_million_prompt_tokens, llm.usd_per_million_completion_tokens)
            if llm.provider == "openai" and None in prices:
                raise ValueError(
                    f"budget.max_usd is {self.budget.max_usd:g}, but what llms.{name} costs is not known; set "
                    f"llms.{name}.usd_per_million_prompt_tokens and usd_per_million_completion_tokens"
                )
        return self


def simulators_of(explainer: ExplainerConfig) -> list[str]:
    """Simulator arms that an explainer asks."""
    looks = looks_of(explainer)
    return list(dict.fromkeys([explainer.simulator, *([looks[1]] if looks else [])]))


def llms_used(config: RunConfig) -> set[str]:
    """LLM arms that an explainer asks."""
    return {arm.llm for arm in config.explainers.values() if isinstance(arm, OneShotConfig)}


def judges_used(config: RunConfig) -> set[str]:
    """LLM arms that a further scorer asks."""
    return {scorer.llm for scorer in config.score.scorers.values() if isinstance(scorer, JudgeConfig)}


def calls_per_feature(config: RunConfig) -> int:
    """LLM calls that a feature's arms make at most."""
    calls = 0
    for arm in config.explainers.values():
        if isinstance(arm, OneShotConfig):
            nodes = 1
            if isinstance(arm, TreeConfig):
                nodes = arm.num_llm_roots + arm.depth * arm.width * arm.branching_factor
            calls += nodes * (1 + arm.max_parse_retries)
    return calls


def features_within_calls(config: RunConfig) -> int | None:
    """Features that every `max_calls` suffices for, each counted with all that it may ask; None without a limit."""
    limits = [limit for name in llms_used(config) if (limit := config.llms[name].max_calls) is not None]
    return min(limits) // max(calls_per_feature(config), 1) if limits else None


def looks_of(explainer: ExplainerConfig) -> tuple[str, str] | None:
    """The section that asks for cheap looks, and the simulator arm that takes them; None where there are none."""
    if not isinstance(explainer, TreeConfig):
        return None
    if explainer.cascade:
        return "cascade", explainer.cascade.simulator
    if explainer.strategy == "successive_halving":
        return "halving", explainer.halving.simulator or explainer.simulator
    return None


def _must_exist(field: str, name: str, arms: dict[str, Any]) -> None:
    if name not in arms:
        raise ValueError(f"{field} is {name!r}, which is not defined; defined are: {', '.join(arms) or 'none'}")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file, applies `key.path=value` overrides (values are YAML) and checks the whole.

    Raises:
        UserError: names the field, the value it got and what would be right.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"config file {str(path)!r} holds no sections; start from configs/demo.yaml")
    for override in overrides or []:
        _apply_override(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], origin: str = "config") -> RunConfig:
    """Checks a config given as plain data.

    Raises:
        UserError: one line per wrong field.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(problem, data) for problem in error.errors()]
        raise UserError(f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, sign, value = override.partition("=")
    if not sign:
        raise UserError(f"override {override!r} has no '='; write key.path=value, e.g. corpus.num_sequences=5000")
    *parents, last = path.split(".")
    node = data
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {key!r} is not a section")
    node[last] = yaml.safe_load(value)


def _explain(problem: Any, data: dict[str, Any]) -> str:
    """One validation error as `field: what, got what, what to do`."""
    location = [str(part) for part in problem["loc"]]
    field = ".".join(part for part in location if not part.startswith("function-"))
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], _known_keys(problem["loc"]), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(_known_keys(problem['loc']))}"
        return f"{field}: unknown key{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "missing"):
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {problem['input']!r}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that `location` lies in, found by walking the models."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location[:-1]:
        stepped = [m for model in models for m in _models_in(_annotation(model, part))]
        models = stepped or models
        tagged = [m for m in models if str(part) in _tags(m)]
        models = tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _annotation(model: type[BaseModel], part: int | str) -> Any:
    field = model.model_fields.get(str(part))
    return field.annotation if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def _tags(model: type[BaseModel]) -> set[str]:
    """Values of the discriminator by which pydantic names this model in an error's location."""
    return {str(model.model_fields[key].default) for key in ("engine", "method") if key in model.model_fields}


OPERATIONAL = frozenset(
    {
        *("device", "batch_size", "token_budget", "api_key_env", "timeout_seconds", "max_retries", "max_calls"),
        *("max_concurrency", "requests_per_minute"),
        *("attn_implementation", "tensor_parallel_size", "gpu_memory_utilization"),
        *("usd_per_million_prompt_tokens", "usd_per_million_completion_tokens"),
    }
)
"""Fields of an arm that say how it is run or billed and not what comes out."""


def arm_id(name: str, arm: BaseModel, *context: Any) -> str:
    """`name@hash`: the arm's name and a hash of its content and of what else its results depend on."""
    content = json.dumps([content_of(arm), *context], sort_keys=True)
    return f"{name}@{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def scorer_id(config: RunConfig, name: str) -> str:
    """A further scorer's name in the tables; it covers the LLM or the simulator that it asks."""
    scorer = config.score.scorers[name]
    if isinstance(scorer, JudgeConfig):
        return arm_id(name, scorer, content_of(config.llms[scorer.llm]))
    if isinstance(scorer, SurprisalConfig):
        return arm_id(name, scorer, content_of(config.simulators[scorer.simulator]))
    return arm_id(name, scorer)


def content_of(arm: BaseModel) -> dict[str, Any]:
    """What an arm's results depend on."""
    return arm.model_dump(mode="json", exclude=set(OPERATIONAL))


def service_name(kind: Literal["simulator", "llm"], name: str, config: RunConfig) -> str:
    """The Serve app of an arm: runs that share a cluster have arms of the same names, and an arm may change, or its
    replicas, or this package. One that stands across runs has no run directory in its name."""
    arm = (config.simulators if kind == "simulator" else config.llms)[name]
    replicas = getattr(config.resources, kind)
    run_dir = "" if kind == "simulator" and name in config.resources.standing else config.run_dir
    parts = (run_dir, arm.model_dump_json(), replicas.model_dump_json(), metadata.version("rayinterp"))
    content = " ".join(parts)
    return f"{kind}-{name}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Upstream fields whose values differ, as `path: old -> new`."""
    flat_old, flat_new = (
        {path: value for key in UPSTREAM for path, value in _flatten(key, data.get(key))} for data in (old, new)
    )
    return [
        f"{path}: {flat_old.get(path)!r} -> {flat_new.get(path)!r}"
        for path in dict.fromkeys([*flat_old, *flat_new])
        if flat_old.get(path) != flat_new.get(path) and path not in NOT_FROZEN
    ]


def _flatten(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _flatten(f"{path}.{key}", inner)]
    return [(path, value)]
