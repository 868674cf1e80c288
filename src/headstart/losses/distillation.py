"""Distillation losses: pure functions from logits to one value per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headstart.losses.chunked import chunked_sum
from headstart.losses.gradients import distillation_and_gradient, log_probabilities, widened
from headstart.losses.next_token import cross_entropy
from headstart.system.errors import UserError

Divergence = Literal["forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon"]
Schedule = Literal["constant", "linear", "switch"]


@dataclass(frozen=True)
class DistillationSettings:
    """`alpha * CE + beta * temperature^2 * divergence(teacher, student)`.

    Attributes:
        alpha: weight of the cross-entropy with the text.
        beta: weight of the divergence from the teacher.
        temperature: by which both sides' logits are divided before the softmax.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" the other way round,
            "symmetric_kl" their mean, and "jensen_shannon" measures both against a mixture.
        mixture: the teacher's share of that mixture.
        top_k: forward KL on so many of the teacher's likeliest tokens, and on all others as one
            more; 0 for every token.
        samples: forward KL on so many tokens drawn from the teacher, right on average; 0 for none.
        sampling_temperature: flattens (above 1) or sharpens what they are drawn from.
        schedule: "constant" weights; "linear" from `alpha` and `beta` to `alpha_end` and
            `beta_end`; or a "switch" to these.
        schedule_tokens: when the end of "linear" is reached, or when "switch" does.
        alpha_end: weight of the cross-entropy from then on.
        beta_end: weight of the divergence from then on; at 0 the teacher is no longer asked.
        cache: folder or URL of the teacher's outputs, which a run writes if `headstart
            cache-teacher` did not before; empty to ask the teacher while training.
        cache_dtype: of the numbers in it, "float16" or "float32".
        shard_teacher: spread the teacher's weights over all processes instead of copying them.
        teacher: folder or hub id of another teacher with the same tokenizer; empty for the model
            that was cut.
    """

    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    mixture: float = 0.5
    top_k: int = 0
    samples: int = 0
    sampling_temperature: float = 1.0
    schedule: Schedule = "constant"
    schedule_tokens: int = 0
    alpha_end: float = 1.0
    beta_end: float = 0.0
    cache: str = ""
    cache_dtype: Literal["float16", "float32"] = "float16"
    shard_teacher: bool = False
    teacher: str = ""

    def __post_init__(self) -> None:
        for end in ("", "_end"):
            alpha, beta = getattr(self, f"alpha{end}"), getattr(self, f"beta{end}")
            if min(alpha, beta) < 0 or alpha + beta == 0:
                raise UserError(
                    f"kd.alpha{end} {alpha} and kd.beta{end} {beta} may not be negative, nor both 0"
                )
        for name in ("temperature", "sampling_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"kd.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("top_k", "samples", "schedule_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"kd.{name} is {getattr(self, name)}; it may not be negative")
        if not 0 < self.mixture < 1:
            raise UserError(f"kd.mixture is {self.mixture}; it must lie between 0 and 1")
        if self.top_k and self.samples:
            raise UserError(
                f"kd.top_k {self.top_k} and kd.samples {self.samples} are both set; keep one"
            )
        if self.cache and self.shard_teacher:
            raise UserError(
                f"kd.cache {self.cache} needs no teacher while training; remove kd.shard_teacher"
            )
        if (self.top_k or self.samples) and self.divergence != "forward_kl":
            raise UserError(
                f"kd.divergence {self.divergence} needs all of the teacher's probabilities; remove "
                "kd.top_k and kd.samples, or use forward_kl"
            )
        if self.cache and not self.top_k and not self.samples:
            raise UserError(
                f"kd.cache {self.cache} cannot hold all of the teacher's probabilities; set "
                "kd.top_k or kd.samples"
            )
        if (self.schedule == "constant") != (self.schedule_tokens == 0):
            raise UserError(
                f"kd.schedule is {self.schedule} and kd.schedule_tokens {self.schedule_tokens}; "
                "linear and switch need a number of tokens, and constant takes none"
            )

    def weights(self, tokens: float) -> tuple[float, float]:
        """alpha and beta after so many tokens.

        >>> settings = DistillationSettings(0.2, 0.8, schedule="linear", schedule_tokens=100)
        >>> [settings.weights(tokens) for tokens in (0, 50, 100, 200)]
        [(0.2, 0.8), (0.6, 0.4), (1.0, 0.0), (1.0, 0.0)]
        """
        if self.schedule == "constant":
            return self.alpha, self.beta
        done = min(1.0, tokens / self.schedule_tokens)
        done = done if self.schedule == "linear" else float(done == 1)
        alpha, beta = (
            start * (1 - done) + end * done
            for start, end in ((self.alpha, self.alpha_end), (self.beta, self.beta_end))
        )
        return alpha, beta

    def teacher_tokens(self, tokens: float) -> float:
        """Of the first so many tokens, those for which the teacher is asked."""
        end = self.beta if self.schedule == "constant" else self.beta_end
        if not self.beta and (self.schedule != "linear" or not end):
            return max(0.0, tokens - self.schedule_tokens) if end else 0.0
        return tokens if end else min(tokens, self.schedule_tokens)

    def asked_steps(self, num_steps: int, step_tokens: int) -> range:
        """The optimizer steps in which the teacher has a weight.

        >>> DistillationSettings(schedule="switch", schedule_tokens=1000).asked_steps(50, 300)
        range(0, 4)
        """
        tokens = num_steps * step_tokens
        asked = self.teacher_tokens(tokens)
        if self.beta or not asked:
            return range(math.ceil(asked / step_tokens))
        return range(int((tokens - asked) // step_tokens), num_steps)


def forward_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) of each token at a temperature, in nats, without the factor T^2.

    Source: Hinton et al. (arXiv 1503.02531), section 2.
    """
    teacher = log_probabilities(teacher_logits, temperature)
    return _divergence(teacher, log_probabilities(student_logits, temperature))


def reverse_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """KL(student || teacher) of each token; otherwise as `forward_kl`.

    Source: MiniLLM (arXiv 2306.08543), section 2.1.
    """
    return forward_kl(teacher_logits, student_logits, temperature)


def symmetric_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """The mean of KL(teacher || student) and KL(student || teacher) of each token."""
    student = log_probabilities(student_logits, temperature)
    teacher = log_probabilities(teacher_logits, temperature)
    return ((teacher.exp() - student.exp()) * (teacher - student)).sum(dim=-1) / 2


def jensen_shannon(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 1.0,
    mixture: float = 0.5,
) -> Float[Tensor, " tokens"]:
    """Mean divergence of both sides from their mixture, of each token.

    `m * KL(teacher || M) + (1 - m) * KL(student || M)` with `M = m * teacher + (1 - m) * student`.

    Source: generalised Jensen-Shannon of GKD (arXiv 2306.13649), section 2, whose beta is m.
    """
    student = log_probabilities(student_logits, temperature)
    teacher = log_probabilities(teacher_logits, temperature)
    middle = torch.logaddexp(teacher + math.log(mixture), student + math.log(1 - mixture))
    of_teacher, of_student = _divergence(teacher, middle), _divergence(student, middle)
    return mixture * of_teacher + (1 - mixture) * of_student


class TopK(NamedTuple):
    """What a teacher says of its likeliest tokens, as natural logs of probabilities.

    Attributes:
        ids: the tokens.
        log_probabilities: of each.
        log_tail: of all others together.
    """

    ids: Int[Tensor, "tokens k"]
    log_probabilities: Float[Tensor, "tokens k"]
    log_tail: Float[Tensor, " tokens"]


def top_k(
    teacher_logits: Float[Tensor, "tokens vocab"], count: int, temperature: float = 1.0
) -> TopK:
    """A teacher's `count` likeliest tokens at a temperature; all where it knows fewer."""
    teacher = log_probabilities(teacher_logits, temperature)
    kept, ids = teacher.topk(min(count, teacher.shape[-1]), dim=-1)
    return TopK(ids, kept, teacher.scatter(-1, ids, -math.inf).logsumexp(dim=-1))


def top_k_kl(
    student_logits: Float[Tensor, "tokens vocab"], teacher: TopK, temperature: float = 1.0
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) of each token, with all tokens but the teacher's top k as one.

    A lower bound of `forward_kl`, and equal to it when every token is kept. Unlike a top k that is
    scaled to sum to one it asks the student for no more than the teacher's share of the top.
    """
    student = log_probabilities(student_logits, temperature)
    loss = _divergence(teacher.log_probabilities, student.gather(-1, teacher.ids))
    if teacher.ids.shape[-1] < student.shape[-1]:
        tail = student.scatter(-1, teacher.ids, -math.inf).logsumexp(dim=-1)
        loss = loss + teacher.log_tail.exp() * (teacher.log_tail - tail)
    return loss


class Samples(NamedTuple):
    """Tokens drawn from a teacher.

    Attributes:
        ids: the tokens, with repeats.
        weights: by which a mean over them is right on average.
        log_probabilities: the teacher's natural log of each one's probability.
    """

    ids: Int[Tensor, "tokens samples"]
    weights: Float[Tensor, "tokens samples"]
    log_probabilities: Float[Tensor, "tokens samples"]


def sample(
    teacher_logits: Float[Tensor, "tokens vocab"],
    count: int,
    temperature: float = 1.0,
    sampling_temperature: float = 1.0,
) -> Samples:
    """Draw `count` tokens, with repeats, from a teacher at a temperature.

    They are drawn from its probabilities to the power `1 / sampling_temperature`, and weighted by
    what that makes too likely or too rare.
    """
    logits = widened(teacher_logits) / temperature
    teacher = torch.log_softmax(logits, dim=-1)
    proposal = torch.log_softmax(logits / sampling_temperature, dim=-1)
    ids = torch.multinomial(proposal.exp(), count, replacement=True)
    kept = teacher.gather(-1, ids)
    return Samples(ids, (kept - proposal.gather(-1, ids)).exp() / count, kept)


def sampled_kl(
    student_logits: Float[Tensor, "tokens vocab"], teacher: Samples, temperature: float = 1.0
) -> Float[Tensor, " tokens"]:
    """An estimate of `forward_kl` of each token from samples; value and gradients are unbiased.

    Source: random sampling of "Sparse Logit Sampling" (arXiv 2503.16870), with weights that are
    left as they are where the paper scales them to sum to one.
    """
    student = log_probabilities(student_logits, temperature)
    gap = teacher.log_probabilities - student.gather(-1, teacher.ids)
    return (teacher.weights * gap).sum(dim=-1)


def divergence(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"] | TopK | Samples,
    settings: DistillationSettings,
) -> Float[Tensor, " tokens"]:
    """The divergence that the settings ask for, of each token, without the factor T^2.

    `teacher` is its logits, or what was kept of them at the settings' temperature.
    """
    temperature = settings.temperature
    if isinstance(teacher, Tensor) and settings.top_k:
        teacher = top_k(teacher, settings.top_k, temperature)
    elif isinstance(teacher, Tensor) and settings.samples:
        teacher = sample(teacher, settings.samples, temperature, settings.sampling_temperature)
    if isinstance(teacher, TopK):
        return top_k_kl(student_logits, teacher, temperature)
    if isinstance(teacher, Samples):
        return sampled_kl(student_logits, teacher, temperature)
    if settings.divergence == "jensen_shannon":
        return jensen_shannon(student_logits, teacher, temperature, settings.mixture)
    measure = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "symmetric_kl": symmetric_kl}
    return measure[settings.divergence](student_logits, teacher, temperature)


def distillation_loss(
    student_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    teacher: Float[Tensor, "tokens vocab"] | TopK | Samples,
    settings: DistillationSettings,
    tokens_seen: float = 0.0,
    on_parts: Callable[[Tensor, Tensor], None] = lambda hard, soft: None,
    shared_rows: int | None = None,
) -> Float[Tensor, " tokens"]:
    """`alpha * CE + beta * T^2 * divergence(teacher, student)` of each token.

    T^2 keeps the gradient's size the same at every temperature.

    Args:
        student_logits: of each token.
        targets: the tokens of the text.
        teacher: its logits, or what was kept of them at the settings' temperature.
        settings: divergence and weights.
        tokens_seen: where the schedule of the weights stands.
        on_parts: called with the cross-entropy and with `T^2 * divergence` of each token.
        shared_rows: how many tokens, the first ones, both sides are compared on, as if there were
            no others; None for all. What was kept of a teacher must be of these alone.
    """
    alpha, beta = settings.weights(tokens_seen)
    hard = cross_entropy(student_logits, targets)
    if isinstance(teacher, Tensor):
        teacher = teacher[:, :shared_rows]
    compared = student_logits[:, :shared_rows]
    soft = settings.temperature**2 * divergence(compared, teacher, settings)
    on_parts(hard, soft)
    return alpha * hard + beta * soft


def summed_distillation_loss(
    hidden: Float[Tensor, "tokens embed"],
    output_matrix: Float[Tensor, "vocab embed"],
    targets: Int[Tensor, " tokens"],
    teacher_outputs: Callable[[slice], Tensor | TopK | Samples],
    settings: DistillationSettings,
    tokens_seen: float = 0.0,
    on_parts: Callable[[Tensor, Tensor], None] = lambda hard, soft: None,
    loss_and_gradient: Callable[..., tuple[Tensor, ...]] = distillation_and_gradient,
    shared_rows: int | None = None,
) -> Float[Tensor, ""]:
    """The sum of `distillation_loss` over tokens, without the logits of all at once.

    Args:
        hidden: the student's final hidden states.
        output_matrix: turns them into logits.
        targets: the tokens of the text.
        teacher_outputs: what the teacher says of a slice of the tokens.
        settings: divergence and weights.
        tokens_seen: where the schedule of the weights stands.
        on_parts: called with both parts of the loss of each token, chunk by chunk.
        loss_and_gradient: there to be given compiled; for forward KL over all tokens.
        shared_rows: as for `distillation_loss`.
    """
    alpha, beta = settings.weights(tokens_seen)
    is_plain = settings.divergence == "forward_kl" and not settings.top_k and not settings.samples

    def token_loss(logits: Tensor, chunk: slice) -> Tensor:
        wanted, outputs = targets[chunk], teacher_outputs(chunk)
        return distillation_loss(
            logits, wanted, outputs, settings, tokens_seen, on_parts, shared_rows
        )

    def in_closed_form(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        wanted, outputs = targets[chunk], teacher_outputs(chunk)
        assert isinstance(outputs, Tensor)
        outputs = outputs[:, :shared_rows]
        hard, soft, gradient = loss_and_gradient(
            logits, wanted, outputs, alpha, beta, settings.temperature
        )
        on_parts(hard, soft)
        return alpha * hard + beta * soft, gradient

    return chunked_sum(hidden, output_matrix, token_loss, in_closed_form if is_plain else None)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)
