"""Steps of the parameters of one pipeline stage; they wait for other stages only to measure a clip norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from torch import Tensor

from ...process_groups_config import ProcessGroupCollection
from ..weight_decay_mask import Mask
from .as_functions import FunctionalOptimizer, Gradients, OptimizerState, Schedule, Tensors, differences
from .transformations import Transformation, clipped, free

StageLocalApplyFn = Callable[..., tuple[dict[str, Tensor], Any]]
"""``apply_fn(*, params, grads, opt_state, learning_rate_fn, delete_grads)``, and ``metadata=`` if there is any."""


@dataclass(frozen=True)
class StageLocalOptimizerMetadata:
    """Settings that a stage-local step needs. The field names are eFormer's, so that builders written for it find them.

    Attributes:
        scheduler: Number of finished steps → learning rate, unless a call has a ``learning_rate_fn``.
        weight_decay: Coefficient of weight decay.
        weight_decay_mask: Parameters to decay; None for the optimizer's own choice.
        gradient_accumulation_steps: Micro-steps per step; only 1 is possible here.
        clip_grad: Largest global norm of the gradients of all stages; None or 0: no clipping, no communication.
        adamw_b1: β1 of Adam and AdamW; this and the next three fields are None for other optimizers.
        adamw_b2: β2.
        adamw_eps: ε outside of the root.
        adamw_eps_root: ε inside of the root.
        adamw_mu_dtype: Dtype of the stored first moment; None: the parameter's, but at least float32.
        optimizer_config: All settings of the optimizer.
        extra_kwargs: Further settings, for whatever reads them; optimizers of the registry read ``none_grads``
            (:data:`~.as_functions.NoneGrads`, default ``zero``) and ``pg_collection``, the process groups that the clip norm is
            summed over.
    """

    scheduler: Schedule
    weight_decay: float = 0.0
    weight_decay_mask: Mask | None = None
    gradient_accumulation_steps: int = 1
    clip_grad: float | None = None
    adamw_b1: float | None = None
    adamw_b2: float | None = None
    adamw_eps: float | None = None
    adamw_eps_root: float | None = None
    adamw_mu_dtype: Any = None
    optimizer_config: Any = None
    extra_kwargs: Mapping[str, Any] = field(default_factory=dict)


class _Functions(NamedTuple):
    init: Callable[[Tensors], Any]
    update: Callable[[Gradients, Any, Tensors], tuple[dict[str, Tensor], Any]]


class StageLocalGradientTransformation(_Functions):
    """A transformation, ``(init, update)``, that also has a step for a single pipeline stage.

    Args:
        init: ``init(params)``, the state before the first step.
        update: ``update(grads, state, params)``, new parameters and state.
        apply_fn: The step of a stage; None for none.
        metadata: Settings of the step of a stage; None if it has none.
    """

    metadata: StageLocalOptimizerMetadata | None
    _apply: StageLocalApplyFn | None

    def __new__(
        cls,
        init: Callable[[Tensors], Any],
        update: Callable[[Gradients, Any, Tensors], tuple[dict[str, Tensor], Any]],
        apply_fn: StageLocalApplyFn | None = None,
        metadata: StageLocalOptimizerMetadata | None = None,
    ) -> Self:
        self = super().__new__(cls, init, update)
        self.metadata, self._apply = metadata, apply_fn
        return self

    def updates(self, grads: Gradients, state: Any, params: Tensors) -> tuple[dict[str, Tensor], Any]:
        """``update``, with the difference that it makes to each parameter, as optax returns it; ``params`` do not change."""
        return differences(self.update, grads, state, params)

    def apply_gradients_stage_local(
        self,
        *,
        params: Tensors,
        grads: Gradients,
        opt_state: Any,
        learning_rate_fn: Schedule | None = None,
        delete_grads: bool = False,
    ) -> tuple[dict[str, Tensor], Any]:
        """Take one step of this stage's parameters.

        With clipping, all ranks of the model must call this together; they sum one number, and nothing else crosses stages.

        Args:
            params: Parameters of this stage by name; they change only if the optimizer has ``donate``.
            grads: Gradients of the parameters. None means zeros, unless ``none_grads`` is ``skip``.
            opt_state: State from ``init`` or from the step before.
            learning_rate_fn: Number of finished steps → learning rate, in place of the optimizer's schedule.
            delete_grads: Free the memory of gradients that share it with nothing else; they must not be used again.

        Returns:
            New parameters and state.

        Raises:
            NotImplementedError: when the optimizer has no such step, naming what is missing.
        """
        if self._apply is None:
            raise NotImplementedError(
                "this optimizer was built without a stage-local step; give make_stage_local_gradient_transformation an apply_fn."
            )
        return self._apply(
            params=params,
            grads=grads,
            opt_state=opt_state,
            learning_rate_fn=learning_rate_fn,
            delete_grads=delete_grads,
        )


def make_stage_local_gradient_transformation(
    tx: Transformation, metadata: StageLocalOptimizerMetadata | None = None, apply_fn: StageLocalApplyFn | None = None
) -> StageLocalGradientTransformation:
    """Add ``apply_fn`` to ``tx`` as its stage-local step.

    Args:
        tx: The functional optimizer; its ``init`` and ``update`` do not change.
        metadata: Passed to ``apply_fn`` as ``metadata=``; gradients are clipped to its ``clip_grad`` before ``apply_fn``.
        apply_fn: The step; see :data:`StageLocalApplyFn`.

    Raises:
        ValueError: if ``apply_fn`` is None.
    """
    if apply_fn is None:
        raise ValueError("apply_fn is None; give the stage-local step of the optimizer.")
    with_metadata = apply_fn if metadata is None else _with_metadata(apply_fn, metadata)
    return StageLocalGradientTransformation(tx.init, tx.update, with_metadata, metadata)


def make_unsupported_stage_local_gradient_transformation(
    tx: Transformation, *, optimizer_type: str, reason: str | None = None
) -> StageLocalGradientTransformation:
    """Add to ``tx`` a stage-local step that raises NotImplementedError and says what to do.

    Args:
        tx: The functional optimizer; its ``init`` and ``update`` do not change.
        optimizer_type: Name of the optimizer, for the error.
        reason: Last sentence of the error; None for no reason.
    """
    because = f" Reason: {reason}" if reason else ""

    def refuse(**_: Any) -> tuple[dict[str, Tensor], Any]:
        raise NotImplementedError(
            f"optimizer {optimizer_type!r} has no step of one pipeline stage: its builder does not implement build_mpmd(...). "
            f"Override build_mpmd in the registered builder, or use update, which needs no stages.{because}"
        )

    return make_stage_local_gradient_transformation(tx, apply_fn=refuse)


def stage_local_step(optimizer: FunctionalOptimizer) -> StageLocalApplyFn:
    """The stage-local step of an optimizer of the registry: the step of its class on the parameters of the stage."""

    def apply(
        *,
        metadata: StageLocalOptimizerMetadata,
        params: Tensors,
        grads: Gradients,
        opt_state: OptimizerState,
        learning_rate_fn: Schedule | None = None,
        delete_grads: bool = False,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        if metadata.optimizer_config is None:
            raise NotImplementedError(
                "the metadata has no optimizer_config; a stage-local step needs the optimizer's settings."
            )
        new = optimizer.apply(
            params,
            grads,
            opt_state,
            learning_rate_fn=learning_rate_fn or metadata.scheduler,
            none_grads=metadata.extra_kwargs.get("none_grads", "zero"),
        )
        if delete_grads:
            free(params, grads)
        return new

    return apply


def _with_metadata(apply_fn: StageLocalApplyFn, metadata: StageLocalOptimizerMetadata) -> StageLocalApplyFn:
    groups = ProcessGroupCollection.from_any(metadata.extra_kwargs.get("pg_collection", ProcessGroupCollection()))

    def apply(*, params: Tensors, grads: Gradients, delete_grads: bool = False, **kwargs: Any) -> Any:
        if metadata.gradient_accumulation_steps != 1:
            raise NotImplementedError(
                f"gradient_accumulation_steps={metadata.gradient_accumulation_steps}: a stage-local step takes the gradients "
                f"of all micro-batches at once. Add them up before it (the pipeline's backward does), or use update."
            )
        if metadata.clip_grad:
            grads = clipped(params, grads, metadata.clip_grad, groups, in_place=delete_grads)
        return apply_fn(metadata=metadata, params=params, grads=grads, delete_grads=delete_grads, **kwargs)

    return apply
