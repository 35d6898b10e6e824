"""Games on small boards: one episode a map, several turns, rules that nobody explains.

The prompt holds one neutral sentence, the boards so far and the moves as they were read from the
answers; what the symbols mean and how a game ends has to be found out.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Annotated, Any

from opcd_nemo.config.doc import Doc
from opcd_nemo.errors import UserError
from opcd_nemo.tasks import Context, Episode, Trace, questions
from opcd_nemo.tasks.draws import draw as draw_batch
from opcd_nemo.tasks.draws import draw_version, in_order, require_enough, shuffled
from opcd_nemo.tasks.games.boards import Board, MapPool, Symbols, draw, images
from opcd_nemo.tasks.games.frozen_lake import LETTERS as LAKE_LETTERS
from opcd_nemo.tasks.games.frozen_lake import frozen_lake_maps
from opcd_nemo.tasks.games.rules import Play, Rules, check_symbols, make_rules, random_win_rate
from opcd_nemo.tasks.games.sokoban import LETTERS as ROOM_LETTERS
from opcd_nemo.tasks.games.sokoban import sokoban_maps
from opcd_nemo.types import Message, Split, Turn

_INVALID = "That move cannot be made."
_NO_ACTION = "Move: none was found in the answer."
_REMEDY = " (each map once), or task.repeat_maps=true"


class GameEpisode:
    """One game on one map.

    Every turn is a chat of its own: all that happened stands in one user message, with the moves
    that were read and without the reasoning around them.
    """

    many_turns = True

    def __init__(self, *, uid: str, board: Board, rules: Rules) -> None:
        """Start a game."""
        self.uid = uid
        self.play = Play(board=board, rounds_left=rules.rounds, invalid_moves=0)
        self.answered = True  # until an answer names no action
        self._rules = rules
        hint = [] if rules.hint is None else [rules.hint]
        self._events = [rules.opening, *hint, self._board()]

    @property
    def done(self) -> bool:
        """True when the game has ended."""
        return self.play.ending is not None

    def turn(self, context: Context) -> Turn:
        """Return the game so far for the student, and with the context for the teacher."""
        assert not self.done, self.uid
        return single_turn(self.transcript(), context)

    def longest_turn(self, context: Context) -> Turn:
        """Return the last possible turn, after answers whose echoes are the longest."""
        moved = [f"Move: [{word}]\n{_INVALID}" for word in self._rules.actions]
        longest = max(*moved, _NO_ACTION, key=len)
        events = [longest, self._board()] * (self.play.rounds_left - 1)
        return single_turn("\n\n".join([*self._events, *events]), context)

    def reply(self, text: str) -> None:
        """Play the action that the answer names last."""
        word = self._rules.action(text)
        self.play = self.play.after(None if word is None else self._rules.actions[word])
        self.answered = self.answered and word is not None
        event = _NO_ACTION if word is None else f"Move: [{word}]"
        if word is not None and self.play.invalid_moves:
            event = f"{event}\n{_INVALID}"
        self._events += [event, self._board()]

    def score(self) -> float:
        """Return 1.0 for a win, else 0.0."""
        assert self.done, self.uid
        return float(self.play.ending == "won")

    @property
    def outcome(self) -> str:
        """How and why the game ended, in words."""
        assert self.play.ending is not None, self.uid
        return self._rules.reasons[self.play.ending]

    def trace(self) -> Trace:
        """Return the boards and moves, and the outcome with the environment's reason."""
        return Trace(text=self.transcript(), outcome=self.outcome)

    def transcript(self) -> str:
        """Return the game up to now: the opening, every board and every move."""
        return "\n\n".join(self._events)

    def _board(self) -> str:
        return f"Board:\n{draw(self.play.board, self._rules.symbols)}"


def single_turn(text: str, context: Context) -> Turn:
    """Return a chat of one user message for both, the teacher's with its context."""
    bare: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Turn(student_messages=bare, teacher_messages=context.messages(text))


class GameTask:
    """Games on maps that the splits do not share.

    The splits depend on the maps of the setting and on no seed: the seed only shuffles the training
    maps and the anchors. With `repeat_maps` a batch may be larger than its split: training then
    goes on through the next epoch, the other splits start again; a map that comes again in a batch
    has a number after its uid.
    """

    def __init__(
        self,
        *,
        pool: MapPool,
        rules: Rules,
        num_validation: int,
        num_test: int,
        repeat_maps: bool,
        seed: int,
    ) -> None:
        """Split the maps of the pool.

        Raises:
            UserError: a split would be empty.
        """
        self._pool, self._rules, self._repeat, self._seed = pool, rules, repeat_maps, seed
        for key, count in (("num_validation", num_validation), ("num_test", num_test)):
            if count < 1:
                raise UserError(f"task.{key}", count, "1 or more")
        if num_validation + num_test >= len(pool.maps):
            raise UserError(
                "task.num_validation + task.num_test",
                num_validation + num_test,
                "fewer than that, for the rest is for training",
                problem=f"the setting has {len(pool.maps)} maps",
            )
        maps = shuffled(pool.maps, attrgetter("name"))
        self.maps: dict[Split, list[Board]] = {
            "train": maps[num_test + num_validation :],
            "validation": maps[num_test : num_test + num_validation],
            "test": maps[:num_test],
        }

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        """Return `n` new games, as `Task.episodes` says unless maps may repeat."""
        uses: Counter[str] = Counter()
        episodes: list[Episode] = []
        for board in self._chosen(split, step, n):
            uid = f"{split}/{board.name}"
            again = f"/{uses[uid]}" if uses[uid] else ""
            uses[uid] += 1
            episodes.append(self.play(f"{uid}{again}", board))
        return episodes

    @property
    def draw_version(self) -> int:
        """Which draw training maps come from."""
        return draw_version(len(self.maps["train"]))

    def unit_of(self, uid: str) -> str:
        """Return the uid of the first game on the map that this game is played on."""
        return "/".join(uid.split("/")[:2])  # the split and the board's name

    def play(self, uid: str, board: Board) -> Episode:
        """Return a new game on a map."""
        return GameEpisode(uid=uid, board=board, rules=self._rules)

    def anchors(self, step: int, n: int) -> list[Episode]:
        """Return `n` everyday prompts that the teacher, too, sees without context."""
        return questions.anchors(self._seed, step, n)

    def report(self) -> dict[str, Any]:
        """Return what the setting holds: maps, splits, their overlap, a random player's wins.

        `maps_test_mirrored` counts test maps that are a rotated or reflected training map: other
        maps with other moves, yet not wholly new.
        """
        names = {split: {board.name for board in maps} for split, maps in self.maps.items()}
        uses = Counter(name for split in names.values() for name in split)
        start = {"rounds_left": self._rules.rounds, "invalid_moves": 0}
        rates = {
            split: [random_win_rate(Play(board=board, **start)) for board in maps]
            for split, maps in self.maps.items()
        }
        every = [rate for split in rates.values() for rate in split]
        return {
            "layouts": self._pool.num_layouts,
            "layouts_complete": self._pool.complete,
            "maps": len(uses),
            **{f"maps_{split}": len(found) for split, found in names.items()},
            "maps_overlap": sum(count > 1 for count in uses.values()),
            "maps_test_mirrored": sum(
                not names["train"].isdisjoint(images(n)) for n in names["test"]
            ),
            "random_win_rate": sum(every) / len(every),
            **{f"random_win_rate_{split}": sum(r) / len(r) for split, r in rates.items()},
        }

    def _chosen(self, split: Split, step: int, n: int) -> list[Board]:
        maps = self.maps[split]
        if not self._repeat or n < 1:
            require_enough(split, n, len(maps), "" if self._repeat else _REMEDY)
            if split == "train":
                return draw_batch(maps, attrgetter("name"), seed=self._seed, step=step, n=n)
            return maps[:n]
        if split != "train":
            return [maps[index % len(maps)] for index in range(n)]
        chosen: list[Board] = []
        while len(chosen) < n:
            epoch, first = divmod(step * n + len(chosen), len(maps))
            places = range(first, min(first + n - len(chosen), len(maps)))
            chosen += in_order(maps, attrgetter("name"), places, self._seed, epoch)
        return chosen


def lake_rules(*, rounds: int, symbols: Symbols, controls: Mapping[str, Sequence[str]]) -> Rules:
    """Build the rules of Frozen Lake.

    Raises:
        UserError: a setting is out of range.
    """
    check_symbols(symbols, LAKE_LETTERS)
    won = "{player} reached {goal}.".format(**symbols)
    lost = "{player} stepped on {hole}.".format(**symbols)
    return make_rules(rounds, symbols, controls, won, lost)


def room_rules(*, rounds: int, symbols: Symbols, controls: Mapping[str, Sequence[str]]) -> Rules:
    """Build the rules of Sokoban.

    Raises:
        UserError: a setting is out of range.
    """
    check_symbols(symbols, ROOM_LETTERS)
    won = "every {box} was pushed onto an {target}.".format(**symbols)
    return make_rules(rounds, symbols, controls, won, lost="")


@dataclass(frozen=True, slots=True, kw_only=True)
class GameSettings:
    """The keys that `conf/task/frozen_lake.yaml` and `conf/task/sokoban.yaml` share."""

    size: Annotated[int, Doc(words="rows, and columns, of the board")]
    rounds: Annotated[int, Doc(words="moves after which a game ends")]
    num_maps: Annotated[int | None, Doc(words="maps of all splits; null: every map there is")]
    map_seed: Annotated[int, Doc(words="which maps; the run's seed changes no map and no split")]
    num_validation: Annotated[int, Doc(words="maps to choose by")]
    num_test: Annotated[int, Doc(words="maps to report; those left over are for training")]
    repeat_maps: Annotated[bool, Doc(words="more episodes than maps may be asked for")]
    symbols: Annotated[Mapping[str, str], Doc(words="what is drawn for each thing on the board")]
    controls: Annotated[
        Mapping[str, Sequence[str]], Doc(words="the words in brackets that are moves")
    ]
    hint: Annotated[str | None, Doc(words="a text that every player reads after the opening")]
    seed: Annotated[int, Doc(words="of the order in which training maps come")]

    def __post_init__(self) -> None:
        """Check the number of maps before any map is drawn."""
        if self.num_maps is not None and (not isinstance(self.num_maps, int) or self.num_maps < 3):
            raise UserError("task.num_maps", self.num_maps, "3 or more, at least a map a split")

    def task_on(self, pool: MapPool, rules: Rules) -> GameTask:
        """Build the task of these maps and rules."""
        _check_found(pool, self.num_maps)
        return GameTask(
            pool=pool,
            rules=replace(rules, hint=self.hint),
            num_validation=self.num_validation,
            num_test=self.num_test,
            repeat_maps=self.repeat_maps,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenLakeSettings(GameSettings):
    """The keys of `conf/task/frozen_lake.yaml`."""

    num_holes: Annotated[int, Doc(words="holes of a lake")]

    def build(self) -> GameTask:
        """Build the task.

        Raises:
            UserError: a setting is out of range.
        """
        rules = lake_rules(rounds=self.rounds, symbols=self.symbols, controls=self.controls)
        pool = frozen_lake_maps(
            size=self.size,
            num_holes=self.num_holes,
            rounds=self.rounds,
            num_maps=self.num_maps,
            map_seed=self.map_seed,
        )
        return self.task_on(pool, rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class SokobanSettings(GameSettings):
    """The keys of `conf/task/sokoban.yaml`; its maps are drawn, so their number must be given."""

    num_maps: Annotated[int, Doc(words="maps of all splits")]
    num_boxes: Annotated[int, Doc(words="boxes, and as many targets")]
    num_walls: Annotated[int, Doc(words="wall cells inside the room")]
    min_moves: Annotated[int, Doc(words="of a shortest solution, at least")]

    def build(self) -> GameTask:
        """Build the task.

        Raises:
            UserError: a setting is out of range.
        """
        rules = room_rules(rounds=self.rounds, symbols=self.symbols, controls=self.controls)
        pool = sokoban_maps(
            size=self.size,
            num_boxes=self.num_boxes,
            num_walls=self.num_walls,
            min_moves=self.min_moves,
            rounds=self.rounds,
            num_maps=self.num_maps,
            map_seed=self.map_seed,
        )
        return self.task_on(pool, rules)


def _plug(settings: type[FrozenLakeSettings] | type[SokobanSettings]) -> Callable[..., GameTask]:
    """What `_target_` names: a function whose keywords are the fields of the settings."""

    def build(**keys: Any) -> GameTask:
        return settings(**keys).build()

    # plugs are checked by their signature
    build.__signature__ = inspect.signature(settings, eval_str=True)  # type: ignore[attr-defined]
    return build


frozen_lake = _plug(FrozenLakeSettings)
sokoban = _plug(SokobanSettings)


def _check_found(pool: MapPool, num_maps: int | None) -> None:
    found = len(pool.maps)
    if found < (num_maps or 3):
        raise UserError(
            "task.num_maps",
            num_maps,
            f"at most {found}, or a setting with more maps (3 at least)",
            problem=f"{found} maps that can be won within task.rounds were found in "
            f"{pool.num_layouts} different layouts",
        )
