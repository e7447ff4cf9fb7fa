import torch

from robustlayers.attacks._ascent import Best
from robustlayers.attacks._goal import make_goal

Y = torch.tensor([0, 0, 0, 0, 0])
LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.00001, 0.0], [1.0, 0.0, 2.0], [float("nan"), 1.0, 0.0]]
)


def test_an_image_is_broken_where_its_label_is_not_predicted_and_settled_beyond_rounding():
    goal = make_goal("ce", Y)
    assert goal.broken(LOGITS).tolist() == [False, True, True, True, True]
    assert goal.settled(LOGITS).tolist() == [False, True, False, True, False]


def test_a_target_is_reached_where_it_is_predicted():
    goal = make_goal("ce", Y, torch.tensor([1, 1, 1, 1, 1]))
    assert goal.broken(LOGITS).tolist() == [False, True, True, False, False]
    assert goal.settled(LOGITS).tolist() == [False, True, False, False, False]
    part = goal.take(torch.tensor([3, 1]))
    assert part.broken(LOGITS[[3, 1]]).tolist() == [False, True] and part.reach


def test_what_barely_breaks_an_image_is_no_reason_to_stop():
    """An equivalent forward, or another batch size, may undo it; the attack goes on, and a clear break replaces it."""
    goal, best = make_goal("margin", Y[:1]), Best(torch.zeros(1, 2), stop=True)

    def look(point, *logits):
        z = torch.tensor([logits])
        best.update(goal, torch.full((1, 2), point), z, goal.losses(z), torch.tensor([0]))
        return float(best.x[0, 0]), len(best.standing())

    assert look(1.0, 1.0, 0.0) == (1.0, 1)
    assert look(2.0, 1.0, 1.00001) == (2.0, 1)
    assert look(3.0, 1.0, 0.5) == (2.0, 1)  # broken comes before not broken
    assert look(4.0, 1.0, 1.5) == (4.0, 0)
    assert look(5.0, 1.0, 9.0) == (4.0, 0)  # the first clear one stays


def test_without_stopping_the_highest_loss_stays():
    goal, best = make_goal("margin", Y[:1]), Best(torch.zeros(1, 2))
    for point, other in ((1.0, 1.5), (2.0, 9.0), (3.0, 0.0)):
        z = torch.tensor([[1.0, other]])
        best.update(goal, torch.full((1, 2), point), z, goal.losses(z))
    assert float(best.x[0, 0]) == 2.0


def test_a_batch_is_made_smaller_only_where_it_pays():
    y = torch.zeros(16, dtype=torch.long)
    goal, best, rows = make_goal("ce", y), Best(torch.zeros(16, 2), stop=True), torch.arange(16)
    z = torch.tensor([[1.0, 0.0]]).repeat(16, 1)
    for broken, left in ((1, None), (2, 14), (16, 0)):
        z[:broken] = torch.tensor([0.0, 1.0])
        best.update(goal, torch.zeros(16, 2), z, goal.losses(z), rows)
        places = best.compact(rows)
        assert left is None if places is None else len(places) == left
