"""Small runs, without pictures unless a test asks for them."""

from tests.training.running import _no_pictures, _same_threads_afterwards, finished, people, pictures, tiny

__all__ = ["_no_pictures", "_same_threads_afterwards", "finished", "people", "pictures", "tiny"]
