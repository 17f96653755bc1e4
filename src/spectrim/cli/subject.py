"""What a command works on: a model, its layers and batches, as the command line names them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cli.batches import Batches
from spectrim.cli.common import LARGEST, is_of_memory, usage
from spectrim.cli.data import load_data
from spectrim.cli.models import load_model, whose_weights
from spectrim.cli.options import ExampleOptions, InputOptions, LayerOptions, NetworkOptions, TrainingOptions
from spectrim.cli.references import UsageError
from spectrim.cli.values import read_shape
from spectrim.cost.latency import Latency
from spectrim.cost.runtimes import runtime_of
from spectrim.errors import CalibrationError, ForwardError, SpectrimError, did_you_mean, in_short
from spectrim.network.sites import Sites
from spectrim.nn.timing import ready
from spectrim.nn.watch.batches import Feed, in_order
from spectrim.nn.watch.nesting import tensors
from spectrim.nn.watch.sampling import Sampling
from spectrim.nn.watch.state import evaluating
from spectrim.preparation import sites_of
from spectrim.report import accuracy
from spectrim.report.measures import inputs as called_inputs
from spectrim.train.batches import epoch_length, split


@dataclass(frozen=True)
class Subject:
    """What a command works on."""

    network: NetworkOptions  # what names the model, and says how it is run where time is measured
    dense: nn.Module  # the model
    sites: Sites  # where something may be chosen
    # Batches, if there are any.
    training: Iterable[Any] | None
    calibration: Iterable[Any] | None
    testing: Iterable[Any] | None
    example: Any  # A batch as latency and memory are measured with; None without any batch or shape
    latency: Latency | None  # how time is measured; None if nothing asks for it
    sampling: Sampling  # how many rows calibration keeps
    feed: Feed  # how the model is run on calibration batches, and what in them is data
    named: Mapping[str, str]  # references of model, weights and data as given, by their role

    @classmethod
    def load(
        cls,
        network: NetworkOptions,
        layers: LayerOptions,
        inputs: InputOptions,
        training: TrainingOptions = TrainingOptions(),  # noqa: B008 (frozen)
        *,
        timed: bool = False,
    ) -> Subject:
        """Load what a command line names."""
        device = device_named(network.device, network.threads, network.runtime)
        dense = load_model(network.model, network.weights).to(device)
        with usage():
            sites = sites_of(dense, skip=layers.skip or (), only=layers.only or ())
        train = training_batches(training.train, device, dense) if training.train is not None else None
        data = load_data(inputs.data, purpose="calibration", device=device)
        test = load_data(training.test, purpose="test", device=device)
        if test is not None:
            _check_words(train, test)
            _check_test(dense, _first(test, str(training.test)))
        example = None
        seen, name = (train, training.train) if data is None else (data, inputs.data)
        if data is None and inputs.input_shape is not None:
            example = random_input(inputs.input_shape, network.batch, device, dense)
        elif seen is not None:
            example = first_batch(seen, network.batch, str(name), dense)
        if inputs.mask is not None and data is not None:
            _check_mask(inputs.mask, dense, _first(data, str(inputs.data)))
        if example is not None:
            ready(dense, called_inputs(dense, example), network.runtime)  # before there is anything that could be lost
        clock = Latency(device=device, batch=network.batch, runtime=network.runtime) if timed else None
        named = {
            "model": network.model, "weights": network.weights, "calibration data": inputs.data,
            "training data": training.train, "test data": training.test,
        }  # fmt: skip
        named = {role: str(text) for role, text in named.items() if text is not None}
        sampling, feed = Sampling(inputs.rows or "auto", inputs.positions), Feed(mask=inputs.mask)
        return cls(network, dense, sites, train, data, test, example, clock, sampling, feed, named)

    @functools.cached_property
    def whose(self) -> str:
        """Whose weights the model has, in words."""
        return whose_weights(self.network.model, self.network.weights)

    @property
    def references(self) -> dict[str, Iterable[Any] | None]:
        """Batches by the option that names them."""
        return {"--data": self.calibration, "--train": self.training, "--test": self.testing}

    def score(self, model: nn.Module) -> float:
        """Percent of the test samples."""
        assert self.testing is not None
        with usage("--test"):
            return accuracy(model, self.testing)


def device_named(device: str, threads: int | None, runtime: str = "eager") -> str:
    """The device that a name stands for; sets the number of threads, too."""
    found = _device_named(device, threads)
    try:
        runtime_of(runtime).check(found, torch.float32, "contiguous")
    except (ImportError, ValueError) as error:
        raise UsageError(f"--runtime {runtime}: {error}") from error
    return found


def _device_named(device: str, threads: int | None) -> str:
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = in_short(error).rstrip(".")
        raise UsageError(
            f"--device {device}: {said}; write cpu, or auto, which takes a GPU where there is one"
        ) from error
    return device


def random_input(text: str, samples: int, device: str, model: nn.Module) -> Tensor:
    """A batch of normal noise of a shape given as ``3x224x224``, which a model has been run on."""
    shape = read_shape(text)
    _check_batch(samples, math.prod(shape))
    try:
        with running(model, f"--input {text}"):
            one = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            Feed().decide(model, one)(model, one)
    except CalibrationError as error:
        raise UsageError(
            f"{str(error).partition('. Give batches')[0]}. Write --input with the sizes of one sample, without the "
            "batch, as 3x224x224; a model of words or of several inputs is given --data"
        ) from error
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def _check_batch(samples: int, numbers: float) -> None:
    """Refuse more samples of so many numbers than any memory is meant for, before they are made."""
    if samples * numbers > LARGEST:
        raise UsageError(
            f"--batch {samples} is too large: of samples of {numbers:,.0f} numbers write at most "
            f"{max(1, int(LARGEST // numbers)):,}"
        )


@contextlib.contextmanager
def running(model: nn.Module, named: str) -> Iterator[None]:
    """Run a model in evaluation mode on what the command line names.

    Raises ForwardError for what the model raises; the message names the model, the option and what can be done.
    """
    try:
        with evaluating(model):
            yield
    except CalibrationError as error:
        raise type(error)(f"{named}: {error}") from error
    except Exception as error:  # the model is somebody else's and may raise anything
        if isinstance(error, SpectrimError) or is_of_memory(error):
            raise
        why = str(error).partition("\n")[0].rstrip(".")
        raise ForwardError(
            f"{named}: {type(model).__name__} cannot be run on it and raises {type(error).__name__}: {why}. Give "
            "batches of the shape that the model was trained on: samples first, then its channels or features"
        ) from error


def first_batch(batches: Iterable[Any], samples: int, name: str, model: nn.Module) -> Any:
    """``samples`` samples of the batch that costs are counted with, as a model takes it, repeated if it has fewer."""
    batch = _first(batches, name)
    with running(model, f"data {name!r}"):
        feed = Feed().decide(model, batch)
        if isinstance(batches, list | tuple):
            _, batch = next(in_order(model, batches, feed))
        _check_batch(samples, sum(t.numel() for t in tensors(batch)) / feed.layout.size(batch))
        feed(model, batch := feed.resized(batch, samples))
    return batch


def example_batch(
    batches: Iterable[Any] | None, inputs: ExampleOptions, samples: int, device: str, model: nn.Module
) -> Any:
    """``samples`` samples of batches, or random ones of the shape that was given."""
    if batches is None:
        return random_input(str(inputs.input_shape), samples, device, model)
    return first_batch(batches, samples, str(inputs.data), model)


def _check_words(train: Iterable[Any] | None, test: Iterable[Any] | None) -> None:
    """Refuse words for classes that are numbered differently where a network is trained and where it is tested."""
    if isinstance(train, Batches) and isinstance(test, Batches) and train.names and test.names:
        for one in sorted({*train.names} ^ {*test.names}):
            here, there = ("--train", "--test") if one in train.names else ("--test", "--train")
            raise UsageError(
                f"classes are numbered in alphabetical order, and {one!r} is one in {here} but not in {there}: give "
                f"{there} an empty folder for it, or numbers of classes as labels"
            )


def _check_test(model: nn.Module, batch: Any) -> None:
    """Refuse labels that are none of the model's answers, before there is anything that could be lost."""
    with running(model, "--test"):
        Feed().decide(model, batch)(model, batch)
    with usage("--test"):
        accuracy(model, [batch])


def _check_mask(name: str, model: nn.Module, batch: Any) -> None:
    """Refuse a mask that no tensor of a batch is."""
    with running(model, "--data"):
        layout = Feed().decide(model, batch).layout
    names = list(map(str, layout.named(batch)))
    if name not in names:
        there = f"tensors {', '.join(map(repr, names))}" if names else "no tensors with names"
        close = did_you_mean(name, names)
        raise UsageError(f"--mask {name!r}: the batches of --data hold {there}; leave it out, or name one.{close}")


def _first(batches: Iterable[Any], name: str) -> Any:
    for batch in batches:
        return batch
    raise UsageError(f"data {name!r} is empty")


def training_batches(text: str, device: str, model: nn.Module) -> Iterable[Any]:
    """The batches that ``--train`` names, fit for training a model."""
    batches = load_data(text, purpose="training", device=device)
    try:
        epoch_length(batches, needed=True)
        inputs, _ = split(_first(batches, text))
        with running(model, f"--train {text}"):
            Feed().decide(model, (inputs,))(model, (inputs,))
    except TypeError as error:
        raise UsageError(f"--train {text!r} cannot be trained on: {error}") from error
    _check_classes(model, batches, text)
    return batches


def _check_classes(model: nn.Module, batches: Iterable[Any], text: str) -> None:
    """Refuse labels that a classifier has no output for, before anything is fitted to batches."""
    if not isinstance(batches, Batches) or batches.classes == 0:
        return  # what a function returns may be trained on in another way
    with torch.no_grad():
        outputs = Feed().decide(model, batch := _first(batches, text))(model.eval(), batch)
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and batches.classes > outputs.shape[1]:
        raise UsageError(
            f"--train {text!r} has labels up to {batches.classes - 1}, and the model answers with {outputs.shape[1]} "
            "numbers, for classes 0 and up: give a model with as many outputs as classes, or other labels"
        )
