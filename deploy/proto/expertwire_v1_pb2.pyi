from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]

class BranchFate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BRANCH_FATE_UNSPECIFIED: _ClassVar[BranchFate]
    BRANCH_FATE_KEPT: _ClassVar[BranchFate]
    BRANCH_FATE_PRUNED: _ClassVar[BranchFate]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
BRANCH_FATE_UNSPECIFIED: BranchFate
BRANCH_FATE_KEPT: BranchFate
BRANCH_FATE_PRUNED: BranchFate

class ScoreRequest(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("prompt", "text", "prompt_token_ids", "token_ids", "complete")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    text: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    complete: bool
    def __init__(self, prompt: _Optional[str] = ..., text: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., complete: bool = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, scores: _Optional[_Iterable[float]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "chat", "sampling_params", "priority", "tenant", "cache_salt", "strategy", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    chat: Chat
    sampling_params: SamplingParams
    priority: int
    tenant: str
    cache_salt: str
    strategy: Strategy
    model: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling_params: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., cache_salt: _Optional[str] = ..., strategy: _Optional[_Union[Strategy, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "tools", "reasoning_effort", "thinking", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    REASONING_EFFORT_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_KWARGS_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    messages: str
    tools: str
    reasoning_effort: str
    thinking: bool
    chat_template_kwargs: str
    add_generation_prompt: bool
    continue_final_message: bool
    def __init__(self, messages: _Optional[str] = ..., tools: _Optional[str] = ..., reasoning_effort: _Optional[str] = ..., thinking: bool = ..., chat_template_kwargs: _Optional[str] = ..., add_generation_prompt: bool = ..., continue_final_message: bool = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "prompt_logprobs", "n", "skip_special_tokens", "expert_load", "thinking_budget", "thinking_grace", "min_thinking_tokens")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    THINKING_BUDGET_FIELD_NUMBER: _ClassVar[int]
    THINKING_GRACE_FIELD_NUMBER: _ClassVar[int]
    MIN_THINKING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    prompt_logprobs: int
    n: int
    skip_special_tokens: bool
    expert_load: bool
    thinking_budget: int
    thinking_grace: int
    min_thinking_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., n: _Optional[int] = ..., skip_special_tokens: bool = ..., expert_load: bool = ..., thinking_budget: _Optional[int] = ..., thinking_grace: _Optional[int] = ..., min_thinking_tokens: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "chunks", "prompt_logprobs", "usage", "opens_reasoning", "group", "cascade")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    OPENS_REASONING_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CASCADE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    usage: Usage
    opens_reasoning: bool
    group: GroupResult
    cascade: CascadeResult
    def __init__(self, request_id: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., opens_reasoning: bool = ..., group: _Optional[_Union[GroupResult, _Mapping]] = ..., cascade: _Optional[_Union[CascadeResult, _Mapping]] = ...) -> None: ...

class CascadeResult(_message.Message):
    __slots__ = ("model", "reason", "policy_version", "legs", "in_random_slice")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    IN_RANDOM_SLICE_FIELD_NUMBER: _ClassVar[int]
    model: str
    reason: str
    policy_version: str
    legs: _containers.RepeatedCompositeFieldContainer[CascadeLeg]
    in_random_slice: bool
    def __init__(self, model: _Optional[str] = ..., reason: _Optional[str] = ..., policy_version: _Optional[str] = ..., legs: _Optional[_Iterable[_Union[CascadeLeg, _Mapping]]] = ..., in_random_slice: bool = ...) -> None: ...

class CascadeLeg(_message.Message):
    __slots__ = ("model", "tokens", "complete", "latency_s", "draft_tokens", "accepted_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    tokens: int
    complete: bool
    latency_s: float
    draft_tokens: int
    accepted_tokens: int
    def __init__(self, model: _Optional[str] = ..., tokens: _Optional[int] = ..., complete: bool = ..., latency_s: _Optional[float] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("branch", "token_ids", "text", "logprobs", "finish_reason", "stop_string", "stop_token_id", "expert_load")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    branch: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    stop_string: str
    stop_token_id: int
    expert_load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    def __init__(self, branch: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., expert_load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "decoded_token")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DECODED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    decoded_token: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., decoded_token: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "seed", "cached_prompt_tokens", "reasoning_tokens", "time_to_first_token_s", "total_time_s", "kept_tokens", "pruned_tokens", "verifier_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TIME_S_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRUNED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    seed: int
    cached_prompt_tokens: int
    reasoning_tokens: int
    time_to_first_token_s: float
    total_time_s: float
    kept_tokens: int
    pruned_tokens: int
    verifier_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., reasoning_tokens: _Optional[int] = ..., time_to_first_token_s: _Optional[float] = ..., total_time_s: _Optional[float] = ..., kept_tokens: _Optional[int] = ..., pruned_tokens: _Optional[int] = ..., verifier_tokens: _Optional[int] = ...) -> None: ...

class Strategy(_message.Message):
    __slots__ = ("adaptive_consistency", "auto", "beam_search", "best_of_n", "compute_optimal", "confidence_pruning", "confidence_vote", "dvts", "first_k_finish", "lookahead", "majority_vote", "sequential_revision", "verifier_vote", "custom", "step_retries", "all_branches")
    ADAPTIVE_CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    BEAM_SEARCH_FIELD_NUMBER: _ClassVar[int]
    BEST_OF_N_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_OPTIMAL_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_PRUNING_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_VOTE_FIELD_NUMBER: _ClassVar[int]
    DVTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_K_FINISH_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_VOTE_FIELD_NUMBER: _ClassVar[int]
    SEQUENTIAL_REVISION_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_VOTE_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_FIELD_NUMBER: _ClassVar[int]
    STEP_RETRIES_FIELD_NUMBER: _ClassVar[int]
    ALL_BRANCHES_FIELD_NUMBER: _ClassVar[int]
    adaptive_consistency: AdaptiveConsistency
    auto: Auto
    beam_search: BeamSearch
    best_of_n: BestOfN
    compute_optimal: ComputeOptimal
    confidence_pruning: ConfidencePruning
    confidence_vote: ConfidenceVote
    dvts: Dvts
    first_k_finish: FirstKFinish
    lookahead: Lookahead
    majority_vote: MajorityVote
    sequential_revision: SequentialRevision
    verifier_vote: VerifierVote
    custom: CustomStrategy
    step_retries: StepRetries
    all_branches: bool
    def __init__(self, adaptive_consistency: _Optional[_Union[AdaptiveConsistency, _Mapping]] = ..., auto: _Optional[_Union[Auto, _Mapping]] = ..., beam_search: _Optional[_Union[BeamSearch, _Mapping]] = ..., best_of_n: _Optional[_Union[BestOfN, _Mapping]] = ..., compute_optimal: _Optional[_Union[ComputeOptimal, _Mapping]] = ..., confidence_pruning: _Optional[_Union[ConfidencePruning, _Mapping]] = ..., confidence_vote: _Optional[_Union[ConfidenceVote, _Mapping]] = ..., dvts: _Optional[_Union[Dvts, _Mapping]] = ..., first_k_finish: _Optional[_Union[FirstKFinish, _Mapping]] = ..., lookahead: _Optional[_Union[Lookahead, _Mapping]] = ..., majority_vote: _Optional[_Union[MajorityVote, _Mapping]] = ..., sequential_revision: _Optional[_Union[SequentialRevision, _Mapping]] = ..., verifier_vote: _Optional[_Union[VerifierVote, _Mapping]] = ..., custom: _Optional[_Union[CustomStrategy, _Mapping]] = ..., step_retries: _Optional[_Union[StepRetries, _Mapping]] = ..., all_branches: bool = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("tokens", "branches", "seconds")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    branches: int
    seconds: float
    def __init__(self, tokens: _Optional[int] = ..., branches: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("boxed", "regex", "json_pointer", "whole_text")
    BOXED_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    JSON_POINTER_FIELD_NUMBER: _ClassVar[int]
    WHOLE_TEXT_FIELD_NUMBER: _ClassVar[int]
    boxed: BoxedAnswer
    regex: RegexAnswer
    json_pointer: JsonPointerAnswer
    whole_text: WholeTextAnswer
    def __init__(self, boxed: _Optional[_Union[BoxedAnswer, _Mapping]] = ..., regex: _Optional[_Union[RegexAnswer, _Mapping]] = ..., json_pointer: _Optional[_Union[JsonPointerAnswer, _Mapping]] = ..., whole_text: _Optional[_Union[WholeTextAnswer, _Mapping]] = ...) -> None: ...

class BoxedAnswer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegexAnswer(_message.Message):
    __slots__ = ("pattern", "group")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    group: int
    def __init__(self, pattern: _Optional[str] = ..., group: _Optional[int] = ...) -> None: ...

class JsonPointerAnswer(_message.Message):
    __slots__ = ("pointer",)
    POINTER_FIELD_NUMBER: _ClassVar[int]
    pointer: str
    def __init__(self, pointer: _Optional[str] = ...) -> None: ...

class WholeTextAnswer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifierPolicy(_message.Message):
    __slots__ = ("on_failure", "timeout_s", "max_batch")
    ON_FAILURE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    on_failure: str
    timeout_s: float
    max_batch: int
    def __init__(self, on_failure: _Optional[str] = ..., timeout_s: _Optional[float] = ..., max_batch: _Optional[int] = ...) -> None: ...

class AdaptiveConsistency(_message.Message):
    __slots__ = ("n", "answer", "threshold", "concurrency", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    answer: Answer
    threshold: float
    concurrency: int
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., threshold: _Optional[float] = ..., concurrency: _Optional[int] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class Auto(_message.Message):
    __slots__ = ("answer", "budget")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    answer: Answer
    budget: Budget
    def __init__(self, answer: _Optional[_Union[Answer, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class BeamSearch(_message.Message):
    __slots__ = ("n", "width", "verifier", "step_text", "aggregation", "max_steps", "answer", "verifier_policy", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    STEP_TEXT_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    width: int
    verifier: str
    step_text: str
    aggregation: str
    max_steps: int
    answer: Answer
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., width: _Optional[int] = ..., verifier: _Optional[str] = ..., step_text: _Optional[str] = ..., aggregation: _Optional[str] = ..., max_steps: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class BestOfN(_message.Message):
    __slots__ = ("n", "verifier", "score", "verifier_policy", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    verifier: str
    score: str
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., verifier: _Optional[str] = ..., score: _Optional[str] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class ComputeOptimal(_message.Message):
    __slots__ = ("table", "probe", "signal", "answer", "verifier", "verifier_policy", "budget", "greedy_probe")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    GREEDY_PROBE_FIELD_NUMBER: _ClassVar[int]
    table: _containers.RepeatedCompositeFieldContainer[Bin]
    probe: int
    signal: str
    answer: Answer
    verifier: str
    verifier_policy: VerifierPolicy
    budget: Budget
    greedy_probe: bool
    def __init__(self, table: _Optional[_Iterable[_Union[Bin, _Mapping]]] = ..., probe: _Optional[int] = ..., signal: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., verifier: _Optional[str] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ..., greedy_probe: bool = ...) -> None: ...

class Bin(_message.Message):
    __slots__ = ("strategy", "least", "name", "accuracy", "tokens")
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    strategy: Strategy
    least: float
    name: str
    accuracy: float
    tokens: float
    def __init__(self, strategy: _Optional[_Union[Strategy, _Mapping]] = ..., least: _Optional[float] = ..., name: _Optional[str] = ..., accuracy: _Optional[float] = ..., tokens: _Optional[float] = ...) -> None: ...

class ConfidencePruning(_message.Message):
    __slots__ = ("n", "answer", "warm_up", "keep_share", "window", "top_share", "consensus", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_FIELD_NUMBER: _ClassVar[int]
    KEEP_SHARE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    TOP_SHARE_FIELD_NUMBER: _ClassVar[int]
    CONSENSUS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    answer: Answer
    warm_up: int
    keep_share: float
    window: int
    top_share: float
    consensus: float
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., warm_up: _Optional[int] = ..., keep_share: _Optional[float] = ..., window: _Optional[int] = ..., top_share: _Optional[float] = ..., consensus: _Optional[float] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class ConfidenceVote(_message.Message):
    __slots__ = ("n", "answer", "confidence", "window", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    answer: Answer
    confidence: str
    window: int
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., confidence: _Optional[str] = ..., window: _Optional[int] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class Dvts(_message.Message):
    __slots__ = ("n", "width", "verifier", "step_text", "aggregation", "max_steps", "answer", "verifier_policy", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    STEP_TEXT_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    width: int
    verifier: str
    step_text: str
    aggregation: str
    max_steps: int
    answer: Answer
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., width: _Optional[int] = ..., verifier: _Optional[str] = ..., step_text: _Optional[str] = ..., aggregation: _Optional[str] = ..., max_steps: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class FirstKFinish(_message.Message):
    __slots__ = ("n", "k", "answer", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    k: int
    answer: Answer
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., k: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class Lookahead(_message.Message):
    __slots__ = ("n", "width", "verifier", "lookahead", "step_text", "max_steps", "answer", "verifier_policy", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    STEP_TEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    width: int
    verifier: str
    lookahead: int
    step_text: str
    max_steps: int
    answer: Answer
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., width: _Optional[int] = ..., verifier: _Optional[str] = ..., lookahead: _Optional[int] = ..., step_text: _Optional[str] = ..., max_steps: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class MajorityVote(_message.Message):
    __slots__ = ("n", "answer", "stop_when_decided", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    STOP_WHEN_DECIDED_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    answer: Answer
    stop_when_decided: bool
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., stop_when_decided: bool = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class SequentialRevision(_message.Message):
    __slots__ = ("revisions", "text", "chains", "end_text", "choose", "answer", "budget")
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    END_TEXT_FIELD_NUMBER: _ClassVar[int]
    CHOOSE_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    revisions: int
    text: str
    chains: int
    end_text: str
    choose: str
    answer: Answer
    budget: Budget
    def __init__(self, revisions: _Optional[int] = ..., text: _Optional[str] = ..., chains: _Optional[int] = ..., end_text: _Optional[str] = ..., choose: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class StepRetries(_message.Message):
    __slots__ = ("verifier", "step_text", "least", "max_retries", "verifier_policy", "budget")
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    STEP_TEXT_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MAX_RETRIES_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    verifier: str
    step_text: str
    least: float
    max_retries: int
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, verifier: _Optional[str] = ..., step_text: _Optional[str] = ..., least: _Optional[float] = ..., max_retries: _Optional[int] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class VerifierVote(_message.Message):
    __slots__ = ("n", "answer", "verifier", "verifier_policy", "budget")
    N_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_POLICY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    n: int
    answer: Answer
    verifier: str
    verifier_policy: VerifierPolicy
    budget: Budget
    def __init__(self, n: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., verifier: _Optional[str] = ..., verifier_policy: _Optional[_Union[VerifierPolicy, _Mapping]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class CustomStrategy(_message.Message):
    __slots__ = ("name", "options")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: str
    def __init__(self, name: _Optional[str] = ..., options: _Optional[str] = ...) -> None: ...

class GroupResult(_message.Message):
    __slots__ = ("branches", "selected", "answer", "weights", "reason")
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    SELECTED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    branches: _containers.RepeatedCompositeFieldContainer[BranchResult]
    selected: _containers.RepeatedScalarFieldContainer[int]
    answer: str
    weights: _containers.RepeatedCompositeFieldContainer[AnswerWeight]
    reason: str
    def __init__(self, branches: _Optional[_Iterable[_Union[BranchResult, _Mapping]]] = ..., selected: _Optional[_Iterable[int]] = ..., answer: _Optional[str] = ..., weights: _Optional[_Iterable[_Union[AnswerWeight, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class AnswerWeight(_message.Message):
    __slots__ = ("answer", "weight")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    answer: str
    weight: float
    def __init__(self, answer: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class BranchResult(_message.Message):
    __slots__ = ("index", "fate", "parent", "num_tokens", "num_shared_tokens", "finish_reason", "answer", "score", "problems")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    index: int
    fate: BranchFate
    parent: int
    num_tokens: int
    num_shared_tokens: int
    finish_reason: FinishReason
    answer: str
    score: float
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, index: _Optional[int] = ..., fate: _Optional[_Union[BranchFate, str]] = ..., parent: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_shared_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., answer: _Optional[str] = ..., score: _Optional[float] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("options", "requests", "abort_keys", "credit_keys", "credit_tokens")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ABORT_KEYS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_KEYS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    options: SessionOptions
    requests: _containers.RepeatedCompositeFieldContainer[SubmitRequest]
    abort_keys: _containers.RepeatedScalarFieldContainer[int]
    credit_keys: _containers.RepeatedScalarFieldContainer[int]
    credit_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, options: _Optional[_Union[SessionOptions, _Mapping]] = ..., requests: _Optional[_Iterable[_Union[SubmitRequest, _Mapping]]] = ..., abort_keys: _Optional[_Iterable[int]] = ..., credit_keys: _Optional[_Iterable[int]] = ..., credit_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionOptions(_message.Message):
    __slots__ = ("token_ids_only", "window_tokens", "model")
    TOKEN_IDS_ONLY_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    token_ids_only: bool
    window_tokens: int
    model: str
    def __init__(self, token_ids_only: bool = ..., window_tokens: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("key", "request", "deadline_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    key: int
    request: GenerateRequest
    deadline_s: float
    def __init__(self, key: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("keys", "branches", "num_tokens", "token_ids", "texts", "finish_reasons", "details", "ends")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    branches: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    finish_reasons: _containers.RepeatedScalarFieldContainer[FinishReason]
    details: _containers.RepeatedCompositeFieldContainer[SessionDetails]
    ends: _containers.RepeatedCompositeFieldContainer[SessionEnd]
    def __init__(self, keys: _Optional[_Iterable[int]] = ..., branches: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[str]] = ..., finish_reasons: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., details: _Optional[_Iterable[_Union[SessionDetails, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[SessionEnd, _Mapping]]] = ...) -> None: ...

class SessionDetails(_message.Message):
    __slots__ = ("entry", "logprobs", "stop_string", "stop_token_id", "expert_load", "prompt_logprobs", "opens_reasoning", "group", "cascade")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OPENS_REASONING_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CASCADE_FIELD_NUMBER: _ClassVar[int]
    entry: int
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    stop_string: str
    stop_token_id: int
    expert_load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    opens_reasoning: bool
    group: GroupResult
    cascade: CascadeResult
    def __init__(self, entry: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., expert_load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., opens_reasoning: bool = ..., group: _Optional[_Union[GroupResult, _Mapping]] = ..., cascade: _Optional[_Union[CascadeResult, _Mapping]] = ...) -> None: ...

class SessionEnd(_message.Message):
    __slots__ = ("key", "usage", "code", "message", "retry_after_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    key: int
    usage: Usage
    code: int
    message: str
    retry_after_s: float
    def __init__(self, key: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "request_ids", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., request_ids: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "chat", "add_special_tokens", "model")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    add_special_tokens: bool
    model: str
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., add_special_tokens: bool = ..., model: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids", "skip_special_tokens", "model")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special_tokens: bool
    model: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., skip_special_tokens: bool = ..., model: _Optional[str] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ServedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[ServedModel, _Mapping]]] = ...) -> None: ...

class ServedModel(_message.Message):
    __slots__ = ("name", "problem", "is_cascade")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IS_CASCADE_FIELD_NUMBER: _ClassVar[int]
    name: str
    problem: str
    is_cascade: bool
    def __init__(self, name: _Optional[str] = ..., problem: _Optional[str] = ..., is_cascade: bool = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "uptime_s", "fronts", "config")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    FRONTS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    fronts: int
    config: _containers.RepeatedCompositeFieldContainer[ConfigEntry]
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., fronts: _Optional[int] = ..., config: _Optional[_Iterable[_Union[ConfigEntry, _Mapping]]] = ...) -> None: ...

class ConfigEntry(_message.Message):
    __slots__ = ("name", "value", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetLoadsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Loads(_message.Message):
    __slots__ = ("num_waiting", "num_held", "ranks")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_held: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankLoad]
    def __init__(self, num_waiting: _Optional[int] = ..., num_held: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ...) -> None: ...

class RankLoad(_message.Message):
    __slots__ = ("rank", "num_running", "outstanding_tokens", "blocks_used", "blocks_total")
    class BlocksUsedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BlocksTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    rank: int
    num_running: int
    outstanding_tokens: int
    blocks_used: _containers.ScalarMap[str, int]
    blocks_total: _containers.ScalarMap[str, int]
    def __init__(self, rank: _Optional[int] = ..., num_running: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., blocks_used: _Optional[_Mapping[str, int]] = ..., blocks_total: _Optional[_Mapping[str, int]] = ...) -> None: ...

class WatchExpertsRequest(_message.Message):
    __slots__ = ("interval_s", "model")
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    model: str
    def __init__(self, interval_s: _Optional[float] = ..., model: _Optional[str] = ...) -> None: ...

class ExpertLoads(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    def __init__(self, layers: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("freed_blocks",)
    class FreedBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FREED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    freed_blocks: _containers.ScalarMap[str, int]
    def __init__(self, freed_blocks: _Optional[_Mapping[str, int]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "dtype", "vocab_size", "max_model_len", "eos_token_ids", "num_layers", "num_experts", "top_k", "ep_size", "device", "block_size", "cache_tokens", "max_num_seqs", "seed", "version", "output_format", "chat_variables", "cache_blocks", "cache_bytes", "kv_cache_dtype", "max_queued_requests", "max_queued_requests_per_tenant", "default_sampling_params", "num_labels", "strategies", "verifiers")
    class CacheBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CacheBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CHAT_VARIABLES_FIELD_NUMBER: _ClassVar[int]
    CACHE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_PER_TENANT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_LABELS_FIELD_NUMBER: _ClassVar[int]
    STRATEGIES_FIELD_NUMBER: _ClassVar[int]
    VERIFIERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_layers: int
    num_experts: int
    top_k: int
    ep_size: int
    device: str
    block_size: int
    cache_tokens: int
    max_num_seqs: int
    seed: int
    version: str
    output_format: OutputFormat
    chat_variables: _containers.RepeatedScalarFieldContainer[str]
    cache_blocks: _containers.ScalarMap[str, int]
    cache_bytes: _containers.ScalarMap[str, int]
    kv_cache_dtype: str
    max_queued_requests: int
    max_queued_requests_per_tenant: int
    default_sampling_params: SamplingParams
    num_labels: int
    strategies: _containers.RepeatedScalarFieldContainer[str]
    verifiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., ep_size: _Optional[int] = ..., device: _Optional[str] = ..., block_size: _Optional[int] = ..., cache_tokens: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., seed: _Optional[int] = ..., version: _Optional[str] = ..., output_format: _Optional[_Union[OutputFormat, _Mapping]] = ..., chat_variables: _Optional[_Iterable[str]] = ..., cache_blocks: _Optional[_Mapping[str, int]] = ..., cache_bytes: _Optional[_Mapping[str, int]] = ..., kv_cache_dtype: _Optional[str] = ..., max_queued_requests: _Optional[int] = ..., max_queued_requests_per_tenant: _Optional[int] = ..., default_sampling_params: _Optional[_Union[SamplingParams, _Mapping]] = ..., num_labels: _Optional[int] = ..., strategies: _Optional[_Iterable[str]] = ..., verifiers: _Optional[_Iterable[str]] = ...) -> None: ...

class OutputFormat(_message.Message):
    __slots__ = ("name", "reasoning_start", "reasoning_end", "end_of_turn", "reasoning_efforts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASONING_START_FIELD_NUMBER: _ClassVar[int]
    REASONING_END_FIELD_NUMBER: _ClassVar[int]
    END_OF_TURN_FIELD_NUMBER: _ClassVar[int]
    REASONING_EFFORTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    reasoning_start: str
    reasoning_end: str
    end_of_turn: _containers.RepeatedScalarFieldContainer[str]
    reasoning_efforts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., reasoning_start: _Optional[str] = ..., reasoning_end: _Optional[str] = ..., end_of_turn: _Optional[_Iterable[str]] = ..., reasoning_efforts: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("values", "expert_load")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    values: _struct_pb2.Struct
    expert_load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    def __init__(self, values: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., expert_load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...
