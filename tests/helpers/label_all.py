"""Labels everything as one person does; it loads nothing but the store, for processes that do this alone."""

from align.feedback.queue import Answer, Queue
from align.feedback.store import Store


def work(store: Store, person: int, done: list[str]) -> None:
    """Until nothing is left for this person, each answer sent twice; the keys go to `done`."""
    queue = Queue(store, reask_after=5)
    while tasks := queue.next(person, count=2):
        key = f"key-{person}-{tasks[0].pair.id}-{tasks[0].is_reask}"
        answer = Answer(tasks[0].pair.id, "a", key, is_reask=tasks[0].is_reask)
        assert queue.submit(person, answer) == queue.submit(person, answer)
        done.append(key)
