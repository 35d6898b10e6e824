"""Rollouts by vLLM servers beside the training processes; weights go through files in memory.

    load_weights   every stage writes its tensors, one rank a server has it read them (collective)
    generate       one rank of a tp x pp group asks, a request a prompt; the others get the answers
    sample         the part of `generate` that is no collective: a thread may sample a step ahead

A sample is a function of the weights, the seed, the step and the prompt's index: a server that dies
is started again, and what it had not answered is asked again.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.keeper import start_keeper
from opcd_nemo.engines.megatron import BatchSize
from opcd_nemo.engines.vllm_launch import Launched, find_python
from opcd_nemo.engines.vllm_server import Server, ServerLost
from opcd_nemo.engines.vllm_settings import (
    Gpus,
    Restarts,
    Seconds,
    StartSeconds,
    check_settings,
    first_of_machine,
)
from opcd_nemo.engines.vllm_site import Site, claim, hold, process_name, users_of
from opcd_nemo.engines.vllm_weights import check_room, names_of, write_stage
from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.rollout.engine import Speaker
from opcd_nemo.rollout.sampling import row_seed
from opcd_nemo.storage import heartbeat
from opcd_nemo.storage.ranks import on_every_rank, on_first_of_model
from opcd_nemo.types import Prompt, Sample

if TYPE_CHECKING:  # megatron-core: what checks, plans or reports a run does without
    from opcd_nemo.model.language_model import LanguageModel

logger = logging.getLogger(__name__)

_TICK_S = 10.0  # how often a silent server is looked after
_TOLD_S = 60.0  # how often a long rollout is told of
_GIVE_UP_S = 0.05  # until the requests that are left are given up again


class VllmEngine:
    """The engine of `conf/engine/vllm.yaml`."""

    check = staticmethod(check_settings)

    def __init__(
        self,
        model: LanguageModel,
        eos_ids: Sequence[int],
        *,
        urls: list[str],
        launch: bool,
        python: str | None,
        flags: list[str],
        gpus: Gpus,
        folder: str,
        colocated: bool,
        max_batch_size: BatchSize,
        timeout_s: Seconds,
        start_timeout_s: StartSeconds,
        max_restarts: Restarts,
    ) -> None:
        """Generate with the weights of `model`; `load_weights` speaks to a server first.

        Args:
            model: whose present weights are used.
            eos_ids: token ids that end a response.
            urls: servers, as http://host:port or unix:/path; those that serve `model` are used.
            launch: start a server on each machine of the run, and end it with the run.
            python: of the environment with vLLM, with `launch`; null: that of `make vllm`, else
                the run's.
            flags: further words for the server, with `launch`.
            gpus: of a machine, for its server alone, with `launch`.
            folder: where weights are written for the servers to read; in memory if it can be.
            colocated: servers share the run's GPUs, and sleep while it trains.
            max_batch_size: answers that a rank asks for together.
            timeout_s: of silence.
            start_timeout_s: of a start.
            max_restarts: of a server in a run.
        """
        self._model, self._eos, self._parallel = model, sorted(eos_ids), model.parallel
        self._urls, self._launch, self._python, self._flags = urls, launch, python, flags
        self._gpus = gpus
        self._root, self._colocated, self._width = Path(folder), colocated, max_batch_size
        self._timeout_s, self._start_s = timeout_s, start_timeout_s
        self._max_restarts = max_restarts
        # the next are known when a server has been met
        self._folder, self._token, self._with_head = self._root, "", False
        self._writers: list[int] = []
        self._sites: dict[int, Site] = {}
        self._pushes = 0
        self.weights_version = -1

    @property
    def _speaks(self) -> bool:
        """Whether this rank speaks for its tp x pp group."""
        return self._parallel.tp_rank == self._parallel.pp_rank == 0

    # ------------------------------------------------------------------ weights

    def load_weights(self, version: int) -> None:
        """Give the servers the model's present weights. Collective over the world.

        Raises:
            UserError: on every rank: no server that can be used, or no room for the weights.
            EngineError: on every rank: a server does not take them.
        """
        if not self._writers:
            self._meet()
        elif version == self.weights_version and all(on_every_rank(self._parallel, self._is_held)):
            return  # unless the engine of another model has used the server since
        self._pushes += 1
        name, label = f"{self._token}-{self._pushes}", f"{self._token}:{version}"
        on_every_rank(self._parallel, lambda: self._make_room(name))
        written = on_every_rank(self._parallel, lambda: self._write(name))
        self._check_names(written)
        for index, site in self._sites.items():
            site.weights = (self._place(self._writers[index], name), label)
        on_every_rank(self._parallel, lambda: self._each_of_mine(Site.push))
        self.weights_version = version

    def release_weights(self) -> None:
        """Let servers that share the GPUs sleep until `load_weights`. Collective over the world."""
        self.weights_version = -1
        if self._colocated and self._writers:
            self._parallel.barrier()  # a request to a server that sleeps waits for ever
            on_every_rank(
                self._parallel, lambda: self._each_of_mine(lambda site: site.server.sleep())
            )

    def _each_of_mine(self, act: Callable[[Site], None]) -> None:
        """Do something with the servers that this rank is the first to use."""
        for index, site in self._sites.items():
            if self._writers[index] == self._parallel.dp_rank:
                act(site)

    def _is_held(self) -> bool:
        return all(site.is_held for site in self._sites.values())

    def _place(self, replica: int, name: str) -> Path:
        return self._folder / f"replica={replica}" / name

    @property
    def _writes(self) -> bool:
        """Whether this rank's replica is the first to use some server."""
        return self._parallel.dp_rank in self._writers

    def _make_room(self, name: str) -> None:
        if not (self._speaks and self._writes):
            return
        place = self._place(self._parallel.dp_rank, name)
        place.parent.mkdir(exist_ok=True)
        for old in place.parent.iterdir():  # the server has read them
            shutil.rmtree(old)
        world = self._parallel.world_size
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        copies = -(-len(set(self._writers)) * here // world)  # of this machine
        check_room(self._root, self._model, copies=copies, with_head=self._with_head)
        place.mkdir()

    def _write(self, name: str) -> list[str]:
        if not self._writes:
            return []
        parallel = self._parallel
        place = self._place(parallel.dp_rank, name)
        writes = parallel.tp_rank == 0
        return write_stage(self._model, place, writes=writes, with_head=self._with_head)

    def _check_names(self, written: Sequence[Sequence[str]]) -> None:
        """Refuse to send a part: a server would keep the rest, with a warning in its log."""
        expected = names_of(self._model, with_head=self._with_head)
        copies = len(set(self._writers))
        counts = Counter(name for names in written for name in names)
        wrong = sorted(name for name in expected | set(counts) if counts[name] != copies)
        if wrong:
            raise EngineError(
                f"engine.folder={self._folder}: {len(wrong)} tensors are not written once a "
                f"server, {wrong[0]} the first; no server was given any"
            )

    # ------------------------------------------------------------------ servers

    def _meet(self) -> None:
        """Find or start the servers, and say which replica writes for which. Collective."""
        names = on_every_rank(self._parallel, lambda: (process_name(), secrets.token_hex(4)))
        rank, first = self._parallel.rank, first_of_machine(self._parallel) if self._launch else 0
        shape = self._model.config
        self._folder = self._root / f"opcd-{names[first][0]}-{shape.num_layers}x{shape.hidden_size}"
        self._token = names[0][1]
        opened = on_every_rank(
            self._parallel, lambda: self._open() if rank == first else ([], False)
        )
        urls = [url for each, _ in opened for url in each]
        self._with_head = any(with_head for _, with_head in opened)
        users = users_of(len(urls), self._parallel.dp)
        self._writers = [each[0] for each in users]
        if self._speaks:
            mine = {i: url for i, url in enumerate(urls) if self._parallel.dp_rank in users[i]}
        else:
            mine = {}
        on_every_rank(self._parallel, lambda: self._open_sites(mine))

    def _open(self) -> tuple[list[str], bool]:
        """On a first rank: this model's servers, for this run; whether some have a head to fill."""
        fresh = claim(self._folder)  # else a teacher's engine shares the student's servers
        urls = self._urls
        if self._launch:
            urls = [self._launched.url]
            if fresh:
                try:
                    self._launched.start(self._start_s)
                except ServerLost as lost:
                    allowed = "a server that starts; engine.flags are vLLM's words"
                    raise UserError("engine.launch", True, allowed, problem=str(lost)) from lost
        else:
            if fresh:
                start_keeper(self._folder)
            for url in urls:
                hold(url, self._root)
        served = {url: Server(url).describe(self._start_s) for url in urls}
        fit = [url for url in urls if served[url].difference(self._model.config) is None]
        if not fit:
            differs = served[urls[0]].difference(self._model.config)
            raise UserError("engine.urls", urls, "a server of this model", problem=differs)
        return fit, not all(served[url].model.tied_embeddings for url in fit)

    @cached_property
    def _launched(self) -> Launched:
        """With `launch` the server of this machine, once its folder is known."""
        return Launched(
            self._folder,
            self._model,
            find_python(self._python),
            width=self._width,
            gpus=self._gpus,
            sleeps=self._colocated,
            flags=self._flags,
        )

    def _open_sites(self, urls: Mapping[int, str]) -> None:
        for index, url in urls.items():
            server = Server(url)
            served = server.describe(self._start_s)
            folder = self._folder / f"server={index}"
            folder.mkdir(parents=True, exist_ok=True)
            self._sites[index] = Site(
                server,
                served,
                folder,
                self._launched if self._launch else None,
                max_restarts=self._max_restarts,
                start_s=self._start_s,
            )

    # ------------------------------------------------------------------ answers

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """One continuation a prompt, in order. Collective over tp and pp.

        `prefix_ids` are the server's own affair: it keeps what prompts share.

        Raises:
            EngineError, UserError, OSError: as of `sample`, on every rank of the group.
        """

        def sample() -> list[Sample]:
            return self.sample(prompts, sampling, seed=seed, step=step)

        return on_first_of_model(self._parallel, sample if self._speaks else None)

    def speaker(self) -> Speaker | None:
        """What a thread may sample with, until the next `load_weights`; None where none speaks."""
        return Speaker(self.sample, self.weights_version) if self._speaks else None

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int
    ) -> list[Sample]:
        """What `generate` returns, on the rank that speaks alone; from any thread.

        Raises:
            EngineError: a server is lost for good, or answers what cannot be.
            UserError: a prompt and its answer are too long for the servers.
            OSError: a server's log or weights cannot be written.
        """
        sites = list(self._sites.values())
        for site in sites:
            site.check_length(max((len(each.token_ids) for each in prompts), default=0), sampling)
        found: dict[int, Sample] = {}
        while len(found) < len(prompts):
            try:
                self._ask(sites, prompts, sampling, (seed, step), found)
            except ServerLost as lost:
                next(site for site in sites if site.server.url == lost.url).bring_back(lost)
        return [found[index] for index in range(len(prompts))]

    def _ask(
        self,
        sites: Sequence[Site],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        numbers: tuple[int, int],
        found: dict[int, Sample],
    ) -> None:
        """Send every prompt without an answer in a separate request; take answers as they end.

        Raises:
            ServerLost: of the first server that fails; what was found stays.
        """

        def one(index: int) -> Sample:
            prompt = prompts[index]
            seed = row_seed(*numbers, prompt.index)
            site = sites[index % len(sites)]
            return site.answer(prompt.token_ids, sampling, seed=seed, eos_ids=self._eos)

        for site in sites:
            site.check_awake()
        pool = ThreadPoolExecutor(self._width)
        missing = [index for index in range(len(prompts)) if index not in found]
        waiting: dict[Future[Sample], int] = {pool.submit(one, index): index for index in missing}
        heard = told = time.monotonic()
        try:
            while waiting:
                done, _ = wait(waiting, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                for future in done:
                    found[waiting.pop(future)] = future.result()
                heard = time.monotonic() if done else heard
                if not done:
                    for site in sites:
                        site.check_alive(time.monotonic() - heard, self._timeout_s)
                heartbeat.touch()
                if waiting and time.monotonic() - told > _TOLD_S:
                    told = time.monotonic()
                    logger.info("rollout: %d of %d answers", len(found), len(prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _give_up(sites, waiting)
        for site in sites:
            site.server.expect(site.version)


def _give_up(sites: Sequence[Site], requests: Iterable[Future[Sample]]) -> None:
    """End the requests that wait for answers; a request that connects late is ended then."""
    while running := [each for each in requests if not each.done()]:
        for site in sites:
            site.server.give_up()
        wait(running, timeout=_GIVE_UP_S)
