"""What surrounds training: images, their damage, batches and figures. No kernels; importing this loads none of it.

``decoding``: one encoded image, a path or bytes, to 8-bit pixels. ``images``: the ORL faces, folders of one's own,
folds of identities; ``sources``: the same from ``.rec``, tar files and tables; ``bins`` and ``pair_lists``: pairs to
verify, insightface's, LFW's and one's own. ``glyphs``: Hangul syllables in many fonts, half a million images;
``synthetic_faces``: people who do not exist; ``image_store``: such images in one file, memory-mapped. ``splits``:
identities kept apart. ``degradations``: damage of known severity. ``sampling``: batches that bring several images of
each identity, and look-alikes together. ``evaluation``: verification and identification of identities that were never
trained on (NumPy and scikit-learn). ``decoding``, ``images``, ``glyphs``, ``synthetic_faces``, ``image_store`` and
``evaluation`` need the ``train`` extra, the others torch alone.
"""
