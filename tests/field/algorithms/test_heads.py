"""Embedded domains and a head for each domain, against plain autograd, plain numpy and ERM."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from config import InputError
from engine import generator


def numpy_representation(params, x):
    for i in range(3):
        x = np.maximum(x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"], 0)
    return x


def with_extra(methods, method):
    """Parameters of one network of a method, float64."""
    extra = method.extra_parameters(generator(3, "test"))
    return methods.one_network() | {name: value.double() for name, value in extra.items()}


def test_mtl_is_the_same_training_in_plain_autograd(methods):
    knobs = {"learning_rate": 0.01, "ema": 0.6}
    start = methods.run("MTL", 0, (3,), **knobs)
    network = {key: value[0].clone().requires_grad_() for key, value in start.params.items()}
    trained = [value for key, value in network.items() if not key.startswith("layers.3.")]
    optimizer, memory = torch.optim.Adam(trained, lr=0.01), [torch.zeros(4).double()] * 2
    for features, labels, domains in methods.batches(8, seeds=(3,)):
        losses = []
        for d in range(2):
            x, mine = features[domains == d], labels[domains == d]
            for i in range(3):
                x = F.linear(x, network[f"layers.{i}.weight"], network[f"layers.{i}.bias"]).relu()
            embedding = 0.6 * x.mean(0) + 0.4 * memory[d]
            memory[d] = embedding.detach()
            both = torch.cat([x, embedding.repeat(len(x), 1)], 1)
            losses.append(F.cross_entropy(both @ network["wide_head.weight"].T + network["wide_head.bias"], mine))
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    engine = methods.run("MTL", 8, (3,), **knobs)
    for key, value in network.items():
        assert torch.allclose(engine.params[key][0], value, rtol=0, atol=1e-9), key
    assert torch.allclose(engine.state["embeddings"][0], torch.stack(memory), rtol=0, atol=1e-9)


def test_mtl_without_weights_on_the_embedding_is_erm(methods):
    mtl, erm, batch = methods.make("MTL"), methods.make("ERMBalanced"), methods.one_batch()
    params = with_extra(methods, mtl)
    params["wide_head.weight"][:, 4:] = 0
    narrow = {name: params[name] for name in erm.classifier_names}
    narrow |= {"layers.3.weight": params["wide_head.weight"][:, :4], "layers.3.bias": params["wide_head.bias"]}
    state = mtl.initial_state(params)
    ours, loss, _ = mtl.gradients(params, batch, state, {})
    theirs, their_loss, _ = erm.gradients(narrow, batch, {}, {})
    assert torch.allclose(loss, their_loss)
    for name, value in theirs.items():
        if not name.startswith("layers.3."):
            assert torch.allclose(ours[name], value, rtol=0, atol=1e-12), name
    assert torch.allclose(ours["wide_head.weight"][:, :4], theirs["layers.3.weight"], rtol=0, atol=1e-12)
    assert torch.allclose(ours["wide_head.bias"], theirs["layers.3.bias"], rtol=0, atol=1e-12)
    assert not ours["layers.3.weight"].any()


def test_mtl_predicts_with_the_mean_embedding_of_the_sources(methods):
    method, x = methods.make("MTL"), methods.one_batch().features
    params = with_extra(methods, method)
    embeddings = torch.tensor([[1.0, 2, 3, 4], [3, -2, 0, 8]], dtype=torch.float64)
    found = method.logits(params, {"embeddings": embeddings}, x)
    numbers = {name: value.numpy() for name, value in params.items()}
    z = numpy_representation(numbers, x.numpy())
    both = np.concatenate([z, np.tile([2.0, 0, 1.5, 6], (len(z), 1))], 1)
    assert np.allclose(found.numpy(), both @ numbers["wide_head.weight"].T + numbers["wide_head.bias"], atol=1e-12)


def test_one_head_is_erm(methods):
    of = methods.setup(domains=1)
    heads = methods.run("MultiHead", 0, of=of).params
    own = {"layers.3.weight": heads["heads.weight"].squeeze(1), "layers.3.bias": heads["heads.bias"].squeeze(1)}
    start = methods.start(of=of) | own
    erm = methods.engine(methods.make("ERM", of), first=start)
    for features, labels, domains in methods.batches(10, of, balanced=False):
        erm.step(features, labels, {}, domains)
    ours = methods.run("MultiHead", 10, of=of)
    x = methods.one_batch().features
    assert torch.allclose(ours.logits(x), erm.logits(x), rtol=0, atol=1e-9)
    assert torch.allclose(ours.params["heads.weight"].squeeze(1), erm.params["layers.3.weight"], rtol=0, atol=1e-9)


def test_each_image_trains_the_head_of_its_domain(methods):
    of = methods.setup(domains=3)
    method, batch = methods.make("MultiHead", of), methods.one_batch(of, balanced=False)
    batch = batch._replace(domains=torch.tensor([2, 0, 2, 0, 0, 2]))  # domain 1 has none
    params = with_extra(methods, method)
    assert not torch.allclose(params["heads.weight"][0], params["heads.weight"][2])
    gradient, loss, _ = method.gradients(params, batch, {}, {})
    numbers = {name: value.numpy() for name, value in params.items()}
    z, wanted, slopes = numpy_representation(numbers, batch.features.numpy()), 0.0, np.zeros((3, 3, 4))
    for row, y, d in zip(z, batch.labels.tolist(), batch.domains.tolist(), strict=True):
        logits = numbers["heads.weight"][d] @ row + numbers["heads.bias"][d]
        p = np.exp(logits) / np.exp(logits).sum()
        wanted -= np.log(p[y]) / 6
        slopes[d] += np.outer(p - np.eye(3)[y], row) / 6
    assert np.isclose(loss.item(), wanted)
    assert np.allclose(gradient["heads.weight"].numpy(), slopes, atol=1e-12)
    assert not gradient["layers.3.weight"].any()


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_heads_are_averaged(methods, average):
    method, x = methods.make("MultiHead", average=average), methods.one_batch().features
    params = with_extra(methods, method)
    params["heads.weight"] *= 5
    numbers = {name: value.numpy() for name, value in params.items()}
    z = numpy_representation(numbers, x.numpy())
    each = [z @ numbers["heads.weight"][d].T + numbers["heads.bias"][d] for d in range(2)]
    if average == "probabilities":
        wanted = np.log(sum(np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in each) / 2)
    else:
        wanted = sum(each) / 2
    assert np.allclose(method.logits(params, {}, x).numpy(), wanted, atol=1e-12)


def test_an_unknown_average_is_refused(methods):
    with pytest.raises(InputError, match="`average` of MultiHead"):
        methods.run("MultiHead", 0, average="votes")
