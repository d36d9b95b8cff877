"""The application: train an encoder with Prototype Memory on images, and verify it on identities never seen.

``loop`` runs it all and ``config`` describes a run, ``parts`` the margins, rules and estimators in it; ``protomem
train`` is all that on a command line. ``faces`` the images, ``augmentation`` their changes, ``unrecognizable`` their
ruin, ``encoders`` and ``heads`` (the loss) what trains, ``steps`` one step after another; ``runs`` the folders,
``checkpoints`` and ``files`` what is written into them; ``embedding``, ``report`` and ``pictures`` the end of a run.

Needs the ``train`` extra; what a user can mend is raised as ``errors.RunError``. Importing this loads none of it.
"""
