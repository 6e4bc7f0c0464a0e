"""Tables: projects, items to be judged, their completions, who was given which, what they said, and the log of it all.

    Project 1-n Item 1-n Completion
                Item 1-n Assignment 1-1 Judgement        Event: append-only

What variable parts hold (JSON) is said at each field. Nothing here claims, counts or decides: claims.py, judgements.py.
"""

from typing import Any

from django.conf import settings
from django.core.validators import MinValueValidator
from django.db import models

from palm_rlhf_pytorch.feedback.codes import Kind, State, choices
from palm_rlhf_pytorch.feedback.formats import turns_of


class Project(models.Model):
    """What people are asked, and how often.

    `rules` is a list of texts; each is answered yes, no or unsure of each completion. `required` is how many people
    judge an item. `gold_every`: about one item in so many has a known answer; 0 for none.
    """

    name = models.CharField(max_length=100, unique=True)
    slug = models.SlugField(max_length=100, unique=True)
    kind = models.PositiveSmallIntegerField(choices=choices(Kind), default=Kind.PAIR.value)
    instructions = models.TextField(blank=True)
    rules = models.JSONField(default=list, blank=True)
    required = models.PositiveSmallIntegerField(default=1, validators=[MinValueValidator(1)])
    lease_seconds = models.PositiveIntegerField(default=1800, validators=[MinValueValidator(1)])
    gold_every = models.PositiveSmallIntegerField(default=10)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return str(self.name)


class Item(models.Model):
    """A prompt whose completions are judged.

    `prompt` is text, or a list of turns {"role", "content"}, as it was imported. `key` is the SHA-256 of prompt and
    completions. `gold` is the known answer, None for most: {"choice": -1, 0 or 1}, below 0 where completion 0 is
    better; {"ratings": [1 to 5, ...]} or {"ranks": [0 for the best, ...]} by place. An item is `ready` when its
    completions are there. Higher `priority` comes first. `done` counts judgements. `round` counts rounds of sampling,
    0 for imports.
    """

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="items")
    key = models.CharField(max_length=64)
    prompt = models.JSONField()
    group = models.CharField(max_length=200, blank=True)
    priority = models.FloatField(default=0.0)
    ready = models.BooleanField(default=True)
    done = models.PositiveIntegerField(default=0)
    gold = models.JSONField(null=True, blank=True)
    round = models.PositiveIntegerField(default=0)
    meta = models.JSONField(default=dict, blank=True)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "key"], name="item_once_in_project")]
        indexes = [
            # the queue, and progress, which every page shows, are read from this alone
            models.Index(
                fields=["project", "-priority", "id", "ready", "done"],
                condition=models.Q(gold__isnull=True),
                name="item_queue",
            ),
            models.Index(
                fields=["project", "-priority", "id"], condition=models.Q(gold__isnull=False), name="item_gold"
            ),
        ]

    def __str__(self) -> str:
        return f"item {self.pk}"

    @property
    def turns(self) -> list[dict[str, str]]:
        """The prompt as turns {"role", "content"}; a plain one is a turn of the user's, an empty one none."""
        return turns_of(self.prompt)


class Completion(models.Model):
    """One response; `source` (a model's name) and `score` (a reward model's) are hidden from who judges."""

    item = models.ForeignKey(Item, on_delete=models.CASCADE, related_name="completions")
    place = models.PositiveSmallIntegerField()
    text = models.TextField()
    source = models.CharField(max_length=200, blank=True)
    score = models.FloatField(null=True, blank=True)
    meta = models.JSONField(default=dict, blank=True)

    class Meta:
        ordering = ["place"]
        constraints = [models.UniqueConstraint(fields=["item", "place"], name="completion_place_once")]

    def __str__(self) -> str:
        return f"completion {self.place} of item {self.item_id}"


class Assignment(models.Model):
    """An item given to a person. `order` holds the ids of its completions as they are shown, drawn once."""

    item = models.ForeignKey(Item, on_delete=models.PROTECT, related_name="assignments")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="palm_assignments")
    state = models.PositiveSmallIntegerField(choices=choices(State), default=State.LEASED.value)
    order = models.JSONField(default=list)
    started = models.DateTimeField()
    expires = models.DateTimeField()
    submitted = models.DateTimeField(null=True)
    reason = models.CharField(max_length=500, blank=True)  # of a skip
    undone = models.BooleanField(default=False)  # judged before, and taken back

    class Meta:
        constraints = [models.UniqueConstraint(fields=["item", "user"], name="item_once_for_user")]
        indexes = [models.Index(fields=["user", "state", "submitted"], name="assignment_of_user")]

    def __str__(self) -> str:
        return f"item {self.item_id} for user {self.user_id}"

    @property
    def shown(self) -> list[Completion]:
        """Completions in the order in which this person sees them."""
        by_id = {completion.pk: completion for completion in self.item.completions.all()}
        return [by_id[pk] for pk in self.order]


class Judgement(models.Model):
    """What a person said.

    `choice` is as shown: -3 the first is much better, 0 a tie, 3 the second is; None says that both are bad, or that
    another thing was asked. `ratings` {completion id: 1 to 5}; `ranking` [completion id, ...] best first, those left
    out unranked; `rules` {completion id: {rule: "yes", "no" or "unsure"}}. Keys of JSON are texts. `ms` counts from
    when the item was given.
    """

    assignment = models.OneToOneField(Assignment, on_delete=models.PROTECT, related_name="judgement")
    choice = models.SmallIntegerField(null=True)
    ratings = models.JSONField(default=dict)
    ranking = models.JSONField(default=list)
    rules = models.JSONField(default=dict)
    note = models.TextField(blank=True)
    ms = models.PositiveBigIntegerField(default=0)
    at = models.DateTimeField()

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(choice__range=(-3, 3)), name="choice_has_seven_steps"),
        ]

    def __str__(self) -> str:
        return f"judgement of {self.assignment}"


class _AppendOnly(models.QuerySet):
    """Refuses what would change the log; a row that is added is all that it takes."""

    def bulk_create(self, objs: Any, **options: Any) -> Any:
        """Add rows.

        Raises:
            TypeError: if some of them may be there already.
        """
        if options.get("update_conflicts"):
            raise TypeError("events are append-only: none is changed")
        return super().bulk_create(objs, **options)

    def update(self, **values: Any) -> int:
        """Raise: the log is append-only."""
        raise TypeError("events are append-only: none is changed")

    def delete(self) -> Any:
        """Raise: the log is append-only."""
        raise TypeError("events are append-only: none is deleted")


class Event(models.Model):
    """A line of the log: who did what when. Written by events.record; never changed."""

    at = models.DateTimeField()
    user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.PROTECT, related_name="+")
    verb = models.CharField(max_length=32)
    subject = models.CharField(max_length=150, blank=True)  # what is counted by: a name, an address
    payload = models.JSONField(default=dict)

    objects = _AppendOnly.as_manager()

    class Meta:
        base_manager_name = "objects"
        indexes = [
            models.Index(fields=["verb", "subject", "at"], name="event_by_subject"),
            models.Index(fields=["user", "verb", "at"], name="event_by_user"),
        ]

    def __str__(self) -> str:
        return f"{self.verb} at {self.at}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Add the event.

        Raises:
            TypeError: if it is there already.
        """
        if self.pk is not None:
            raise TypeError("events are append-only: none is changed")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the log is append-only."""
        raise TypeError("events are append-only: none is deleted")
