"""Games on small boards: one episode a map, several turns, rules that nobody explains.

The prompt holds one neutral sentence, the boards so far and the moves as they were read from the
answers; what the symbols mean and how a game ends has to be found out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from opcd_nemo.tasks import Context, Episode, Trace, questions
from opcd_nemo.tasks.draws import draw as draw_batch
from opcd_nemo.tasks.draws import require_enough, shuffled
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
            ValueError: a split would be empty.
        """
        self._pool, self._rules, self._repeat, self._seed = pool, rules, repeat_maps, seed
        for key, count in (("num_validation", num_validation), ("num_test", num_test)):
            if count < 1:
                raise ValueError(f"task.{key}={count}; allowed: 1 or more")
        if num_validation + num_test >= len(pool.maps):
            raise ValueError(
                f"task.num_validation={num_validation} + task.num_test={num_test}: the setting has "
                f"{len(pool.maps)} maps; allowed: fewer than that, for the rest is for training"
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
            return [maps[place % len(maps)] for place in range(n)]
        orders: dict[int, list[Board]] = {}
        chosen = []
        for place in range(step * n, (step + 1) * n):
            epoch, index = divmod(place, len(maps))
            if epoch not in orders:
                orders[epoch] = shuffled(maps, attrgetter("name"), self._seed, epoch)
            chosen.append(orders[epoch][index])
        return chosen


def lake_rules(*, rounds: int, symbols: Symbols, controls: Mapping[str, Sequence[str]]) -> Rules:
    """Build the rules of Frozen Lake.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    check_symbols(symbols, LAKE_LETTERS)
    won = "{player} reached {goal}.".format(**symbols)
    lost = "{player} stepped on {hole}.".format(**symbols)
    return make_rules(rounds, symbols, controls, won, lost)


def room_rules(*, rounds: int, symbols: Symbols, controls: Mapping[str, Sequence[str]]) -> Rules:
    """Build the rules of Sokoban.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    check_symbols(symbols, ROOM_LETTERS)
    won = "every {box} was pushed onto an {target}.".format(**symbols)
    return make_rules(rounds, symbols, controls, won, lost="")


def frozen_lake(
    *,
    size: int,
    num_holes: int,
    rounds: int,
    num_maps: int | None,
    map_seed: int,
    num_validation: int,
    num_test: int,
    repeat_maps: bool,
    symbols: Mapping[str, str],
    controls: Mapping[str, Sequence[str]],
    hint: str | None,
    seed: int,
) -> GameTask:
    """Build the task of `conf/task/frozen_lake.yaml`.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    _check_num_maps(num_maps)
    pool = frozen_lake_maps(
        size=size, num_holes=num_holes, rounds=rounds, num_maps=num_maps, map_seed=map_seed
    )
    _check_found(pool, num_maps)
    return GameTask(
        pool=pool,
        rules=replace(lake_rules(rounds=rounds, symbols=symbols, controls=controls), hint=hint),
        num_validation=num_validation,
        num_test=num_test,
        repeat_maps=repeat_maps,
        seed=seed,
    )


def sokoban(
    *,
    size: int,
    num_boxes: int,
    num_walls: int,
    min_moves: int,
    rounds: int,
    num_maps: int,
    map_seed: int,
    num_validation: int,
    num_test: int,
    repeat_maps: bool,
    symbols: Mapping[str, str],
    controls: Mapping[str, Sequence[str]],
    hint: str | None,
    seed: int,
) -> GameTask:
    """Build the task of `conf/task/sokoban.yaml`.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    _check_num_maps(num_maps)
    pool = sokoban_maps(
        size=size,
        num_boxes=num_boxes,
        num_walls=num_walls,
        min_moves=min_moves,
        rounds=rounds,
        num_maps=num_maps,
        map_seed=map_seed,
    )
    _check_found(pool, num_maps)
    return GameTask(
        pool=pool,
        rules=replace(room_rules(rounds=rounds, symbols=symbols, controls=controls), hint=hint),
        num_validation=num_validation,
        num_test=num_test,
        repeat_maps=repeat_maps,
        seed=seed,
    )


def _check_num_maps(num_maps: object) -> None:
    if num_maps is not None and (not isinstance(num_maps, int) or num_maps < 3):
        raise ValueError(f"task.num_maps={num_maps}; allowed: 3 or more, one a split")


def _check_found(pool: MapPool, num_maps: int | None) -> None:
    found = len(pool.maps)
    if found < (num_maps or 3):
        raise ValueError(
            f"task.num_maps={num_maps}: {found} maps that can be won within task.rounds were found "
            f"in {pool.num_layouts} different layouts; allowed: at most {found}, or a setting with "
            "more maps (3 at least)"
        )
