"""The application: train an encoder with Prototype Memory on images, and verify it on identities never seen.

``loop`` runs it all and ``config`` describes a run, ``parts`` the margins, rules and estimators in it; ``protomem
train`` is all that on a command line. ``faces`` the images, ``augmentation`` their changes, ``unrecognizable`` their
ruin, ``encoders`` and ``heads`` (the loss) what trains, ``steps`` one step after another; ``runs`` the folders,
``checkpoints`` and ``files`` what is written into them; ``embedding``, ``report`` and ``pictures`` the end of a run.

After it, ``trained`` is the encoder with its ``preprocessing``, which ``load_encoder`` gives; ``embedded`` the vectors
of a folder, ``verdict`` two images beside each other with ``thresholds``, ``export`` other programs' formats.

Needs the ``train`` extra; what a user can mend is raised as ``errors.RunError``. Importing this loads none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protomem_kernels.training.trained import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    """Load what ``load_encoder`` needs when it is asked for."""
    if name in __all__:
        from protomem_kernels.training import trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
