"""Class-conditional pipelines over image tokens: the autoregressive teacher, and its students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from diffdistill.method import TokenSampler
from diffdistill.parts.autoregressive import generate, generate_with_teacher, sample_tokens
from diffdistill.pipelines.classes import ClassPipeline
from diffdistill.pipelines.scheduler import untrained_steps
from diffdistill.pipelines.token_nets import TokenNet
from diffdistill.pipelines.vq import VQTokenizer
from diffdistill.tokens import Choice, TokenModel, check_choice


def token_model(net: TokenNet, tokenizer: VQTokenizer, choice: Choice | None = None) -> TokenModel:
    """The interface that methods see, around a network and its tokenizer."""
    return TokenModel(
        net, tokenizer.codebook, tokenizer.groups, inputs=tokenizer.inputs, decode=tokenizer.decode,
        choice=choice,
    )  # fmt: skip


class _TokenPipeline(ClassPipeline):
    """Teacher and students alike."""

    def _begin(self, labels, generator, latents, output_type) -> tuple[Tensor, Tensor]:
        """Labels int64 [N] and unit noise [N, n, C], after checks."""
        net = self.transformer.config
        shape = (sum(self.tokenizer.groups), net.channels)
        return self._start(labels, net.classes, shape, generator, latents, output_type)

    def _pictures(self, vectors: Tensor, output_type: str, return_dict: bool):
        return self._finish(self.tokenizer.decode(vectors).float(), output_type, return_dict)


class AutoregressivePipeline(_TokenPipeline):
    """A teacher: raster order (LlamaGen) or scales (VAR), one pass per group of tokens.

    Args:
        guidance: default of `guidance_scale`, in u + s (c - u); 1 is off. With rule "linear" s
            grows from 1 to this over the groups (VAR, whose `cfg` is this minus 1).
        rule, top_k, top_p, temperature: see `diffdistill.tokens.Choice`.
    """

    model_cpu_offload_seq = "transformer->tokenizer"

    def __init__(
        self,
        transformer: TokenNet,
        tokenizer: VQTokenizer,
        guidance: float = 1.0,
        rule: str = "constant",
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_choice({"rule": rule, "top_k": top_k, "top_p": top_p, "temperature": temperature})
        self.register_modules(transformer=transformer, tokenizer=tokenizer)
        self.register_to_config(
            guidance=guidance, rule=rule, top_k=top_k, top_p=top_p, temperature=temperature
        )

    @property
    def steps(self) -> int:
        return len(self.tokenizer.groups)

    def model(self) -> TokenModel:
        """The interface that methods see."""
        c = self.config
        choice = Choice(c.rule, c.top_k, c.top_p, c.temperature)
        return token_model(self.transformer, self.tokenizer, choice)

    def passes(self, steps: int | None, guidance_scale: float | None) -> int:
        """Network calls per image, each for one group of tokens; guided calls are two."""
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        return self.steps * (1 if guidance in (0, 1) else 2)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image per label.

        Args:
            labels: classes; `classes` itself draws without a class.
            num_inference_steps: None or the number of groups.
            guidance_scale: None: the pipeline's own; 0 and 1 mean no guidance.
            generator: one per image makes every image independent of the batch.
            latents: unit noise [N, n, C] instead of a draw; its first channel decides the tokens.
            output_type: "pil", "pt" ([N, c, H, W] in 0..1) or "np" ([N, H, W, c] in 0..1).
        """
        if num_inference_steps not in (None, self.steps):
            raise ValueError(untrained_steps(num_inference_steps, self.steps))
        label, eps = self._begin(labels, generator, latents, output_type)
        guidance = self.config.guidance if guidance_scale is None else float(guidance_scale)
        model = self.model()
        tokens = sample_tokens(model, eps, {"label": label}, guidance or 1.0)
        return self._pictures(model.vectors(tokens), output_type, return_dict)


class AutoregressiveFewStepPipeline(_TokenPipeline):
    """A student: all tokens in one or two passes.

    Args:
        transformer: of kind "jump" (dd1) or "diffusion" (dd2).
        teacher: optional, of kind "teacher"; it can draw some groups again (`teacher_groups`).
        starts, split, draw: see `diffdistill.method.TokenSampler`.
        guidance: of the teacher, with which the student was distilled.
        rule, top_k, top_p, temperature: of the teacher, see `diffdistill.tokens.Choice`.
    """

    model_cpu_offload_seq = "transformer->teacher->tokenizer"
    _optional_components = ["teacher"]  # noqa: RUF012 (the name and type are diffusers')

    def __init__(
        self,
        transformer: TokenNet,
        tokenizer: VQTokenizer,
        teacher: TokenNet | None = None,
        starts: Sequence[int] = (0,),
        split: int = 0,
        draw: str = "argmax",
        guidance: float = 1.0,
        rule: str = "constant",
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_choice({"rule": rule, "top_k": top_k, "top_p": top_p, "temperature": temperature})
        for net, kinds in ((transformer, ("jump", "diffusion")), (teacher, ("teacher",))):
            if net is not None and net.config.kind not in kinds:
                raise ValueError(
                    f"a network of kind {net.config.kind!r} was given where {' or '.join(kinds)} "
                    "is needed"
                )
        self.register_modules(transformer=transformer, tokenizer=tokenizer, teacher=teacher)
        self.register_to_config(
            starts=list(starts), split=split, draw=draw, guidance=guidance, rule=rule, top_k=top_k,
            top_p=top_p, temperature=temperature,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return len(self.config.starts)

    def passes(self, steps: int | None, guidance_scale: float | None) -> int:
        """Network passes per image, without a teacher."""
        return self.steps

    @torch.no_grad()
    def __call__(
        self,
        labels: int | Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        teacher_groups: tuple[int, int] | None = None,
        split: int | None = None,
        snap: bool = False,
    ) -> ImagePipelineOutput | tuple:
        """One image per label.

        Args:
            labels: classes; `classes` itself draws without a class.
            num_inference_steps: None or the trained number.
            guidance_scale: of the teacher in `teacher_groups`; None: the one that was distilled.
                The student itself needs none.
            generator, latents, output_type: as in AutoregressivePipeline.
            teacher_groups: (a, b): groups a .. b - 1 are drawn again by the teacher, one pass each.
            split: another one than the student's own, for this call: groups below it are read off
                the logits. Together with `teacher_groups` the papers' VAR-d16 has 5, 8 or 9.
            snap: decode the nearest codes instead of the vectors.
        """
        if num_inference_steps not in (None, self.steps):
            raise ValueError(untrained_steps(num_inference_steps, self.steps))
        if teacher_groups is None and guidance_scale not in (None, 0, 1):
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but guidance is distilled into this student. "
                "Leave it out; it acts on the teacher in teacher_groups only."
            )
        label, eps = self._begin(labels, generator, latents, output_type)
        cond, c = {"label": label}, self.config
        student = token_model(self.transformer, self.tokenizer)
        sampler = TokenSampler(tuple(c.starts), self._split(split), c.draw)
        if teacher_groups is None:
            x = generate(student, eps, cond, sampler)
        else:
            guidance = c.guidance if guidance_scale is None else guidance_scale
            x = generate_with_teacher(
                student, self._teacher(), eps, cond, sampler, self._groups(teacher_groups),
                float(guidance) or 1.0,
            )  # fmt: skip
        x = student.vectors(student.nearest(x)) if snap else x
        return self._pictures(x, output_type, return_dict)

    def _split(self, given: int | None) -> int:
        count = len(self.tokenizer.groups)
        if given is not None and self.transformer.config.kind != "jump":
            raise ValueError(f"split={given}, but this student has no logits. Leave it out")
        if given is not None and not 0 <= given <= count:
            raise ValueError(f"split={given}. Give 0 to {count}, the number of groups")
        return self.config.split if given is None else given

    def _teacher(self) -> TokenModel:
        if self.teacher is None:
            raise ValueError(
                "teacher_groups needs the teacher's network, which is not part of this folder. "
                "Load it with from_pretrained(FOLDER, teacher=TEACHER.transformer)."
            )
        c = self.config
        return token_model(
            self.teacher, self.tokenizer, Choice(c.rule, c.top_k, c.top_p, c.temperature)
        )

    def _groups(self, given: tuple[int, int]) -> range:
        count = len(self.tokenizer.groups)
        if not 0 <= given[0] < given[1] <= count:
            raise ValueError(
                f"teacher_groups is {tuple(given)}. Give (a, b) with 0 <= a < b <= {count}, the "
                "number of groups."
            )
        return range(*given)
