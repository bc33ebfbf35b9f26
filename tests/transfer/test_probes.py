"""Layer probes: each measure against its definition, and what is measured on what."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.linear_model import LogisticRegression

from config import InputError
from transfer.convnet import ConvClassifier
from transfer.images import Examples
from transfer.probes import (
    STRENGTH,
    adjusted_rand_index,
    agglomerative,
    balanced_rows,
    centered_gram,
    effective_rank,
    feature_rank,
    kmeans,
    layers_of,
    linear_cka,
    linear_probe,
    matched_accuracy,
    probe_layers,
    standardized,
    weight_rank,
)

CLASSES = ["ant", "bee", "cat"]
ARI = ["ari_agglomerative", "ari_kmeans", "ari_original", "ari_original_kmeans"]
MATCHED = ["accuracy_agglomerative", "accuracy_matched", "accuracy_original", "accuracy_original_kmeans"]


def examples(train=12, test=8, seed=0):
    """Three classes of 8×8 images with the noisy pattern of each."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 8, 8, generator=draw)
    parts = []
    for count in (train, test):
        labels = torch.arange(3).repeat(count)
        parts += [patterns[labels] + 0.7 * torch.randn(len(labels), 1, 8, 8, generator=draw), labels]
    return Examples(*parts, classes=3)


def network(seed=0, depth=1):
    torch.manual_seed(seed)
    return ConvClassifier(1, 8, 3, depth=depth, channels=4)


def dead(depth=2):
    """A network whose last convolution gives nothing that is above 0."""
    silent = network(depth=depth)
    with torch.no_grad():
        silent.convs[-1].weight.zero_()
        silent.convs[-1].bias.fill_(-1)
    return silent


def measured(**options):
    given = {"networks": [network(0), network(1)], "untrained": [network(2), network(3)], "examples": examples()}
    return probe_layers(**given | {"classes": CLASSES, "task": "toy", "progress": False} | options)


def blobs(n=60, size=5, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return draw.normal(size=(n, size)) + 3 * draw.normal(size=(3, size))[labels], labels


def test_a_perfect_clustering_has_accuracy_1_whatever_its_clusters_are_called():
    labels = np.array([0, 0, 1, 1, 2, 2])
    for names in permutations(range(3)):  # of a cycle of three, the inverse is another permutation
        assert (
            matched_accuracy(np.array(names)[labels], labels)
            == adjusted_rand_index(np.array(names)[labels], labels)
            == 1
        )


@pytest.mark.parametrize("clusters", [3, 4])
def test_matched_accuracy_is_the_best_of_all_ways_to_match(clusters):
    draw = np.random.default_rng(clusters)
    labels, found = draw.integers(0, 3, 40), draw.integers(0, clusters, 40)
    ways = (np.array([*names, *[-1] * 4])[found] for names in permutations([0, 1, 2, *[-1] * (clusters - 3)]))
    assert matched_accuracy(found, labels) == max((way == labels).mean() for way in ways)


def test_adjusted_rand_index_counts_pairs_of_different_images():
    # 6 pairs of 4 images: 1 together in both, 2 in each; expected 2 * 2 / 6
    assert adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])) == pytest.approx(
        (1 - 1 / 3) / (1.5 - 1 / 3)
    )


def test_effective_rank_of_known_values():
    assert effective_rank(np.ones(5)) == pytest.approx(5)
    assert effective_rank(np.array([7.0, 7, 0, 0])) == pytest.approx(2)
    shares = np.array([0.5, 0.25, 0.25])
    assert effective_rank(12 * shares) == pytest.approx(2**1.5)
    assert effective_rank(np.zeros(3)) == 0


def test_the_rank_of_a_layer_is_that_of_its_matrix():
    weight = torch.zeros(4, 2, 3, 3)
    weight[0, 0, 0, 0] = weight[1, 1, 2, 2] = 2  # two orthogonal rows of [4, 18]
    assert weight_rank(weight) == pytest.approx(2)
    weight[2] = weight[0]  # singular values 2√2 and 2
    shares = np.array([2**0.5, 1]) / (2**0.5 + 1)
    assert weight_rank(weight) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("shape", [(30, 4), (6, 20)])
def test_the_rank_of_features_is_that_of_their_covariance(shape):
    features = np.random.default_rng(0).normal(size=shape) + 5
    values = np.linalg.eigvalsh(np.cov(features.T)).clip(0)
    assert feature_rank(centered_gram(features)) == pytest.approx(effective_rank(values))
    assert feature_rank(centered_gram(features)) <= min(shape[0] - 1, shape[1])


def test_cka_is_the_formula_of_its_paper_and_blind_to_rotation_and_scale():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(50, 6)) + 2, draw.normal(size=(50, 9))
    y[:, 0] += x[:, 0]
    a, b = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    grams = [centered_gram(values) for values in (x, y)]
    assert 0.02 < cka < 0.9
    assert linear_cka(*grams) == pytest.approx(cka)
    rotation = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    assert linear_cka(grams[0], centered_gram(3 * x @ rotation + 1)) == pytest.approx(1)
    assert np.isnan(linear_cka(grams[0], centered_gram(np.full((50, 3), [0.1, 0.7, 1 / 3]))))


def test_features_are_standardized_on_the_first_rows():
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32) * [1, 5, 0, 1] + [0, 3, 0.1, 0]
    features[:30, 3] = 2  # constant on the first rows only
    scaled = standardized(features, 30)
    np.testing.assert_allclose(scaled[:30, :2].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled[:30, :2].std(0), 1)
    assert not scaled[:, 2:].any()


def test_more_features_than_images_become_coordinates_with_the_same_inner_products():
    features = np.random.default_rng(0).normal(size=(20, 50)) * np.linspace(1, 9, 50)
    scaled, plain = standardized(features, 15), features - features[:15].mean(0)
    plain /= features[:15].std(0)
    assert scaled.shape == (20, 20)
    np.testing.assert_allclose(scaled @ scaled.T, plain @ plain.T, atol=1e-10)


def test_clusters_do_not_depend_on_coordinates():
    features, labels = blobs(size=100)
    plain = (features - features.mean(0)) / features.std(0)
    for seed in range(3):
        assert adjusted_rand_index(kmeans(standardized(features), 4, seed), kmeans(plain, 4, seed)) == 1
    assert adjusted_rand_index(kmeans(plain, 3, 0), labels) == 1


def test_agglomerative_clustering_is_of_cosines_with_average_linkage():
    features = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    theirs = AgglomerativeClustering(6, metric="cosine", linkage="average").fit_predict(features.astype(float))
    clusters = agglomerative(features, 6)
    assert adjusted_rand_index(clusters, theirs) == 1
    lengths = np.random.default_rng(2).uniform(0.1, 9, (50, 1))
    assert adjusted_rand_index(agglomerative(features * lengths, 6), clusters) == 1


@pytest.mark.parametrize("size", [6, 90])
def test_the_linear_probe_is_logistic_regression_on_standardized_features(size):
    features, labels = blobs(n=75, size=size)
    features += 1.2 * size**0.5 * np.random.default_rng(5).normal(size=features.shape)  # so that classes overlap
    train, test = np.split((features - features[:45].mean(0)) / features[:45].std(0), [45])
    model = LogisticRegression(C=STRENGTH / size, tol=1e-8, max_iter=10_000).fit(train, labels[:45])
    first, rest = np.split(standardized(features, 45), [45])
    found = linear_probe(first, labels[:45], rest, labels[45:])
    assert found == pytest.approx(model.score(test, labels[45:]))
    assert 0.4 < found < 1


def test_rows_are_as_many_of_every_class():
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] * 7)
    for most, size in ((3, 3), (100, 4)):
        rows = balanced_rows(labels, most, torch.Generator().manual_seed(0))
        assert labels[rows].bincount().tolist() == [size] * 3
        assert len(rows.unique()) == len(rows)
    first, second = (balanced_rows(labels, 3, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1))
    assert first != second


def test_a_layer_is_what_the_next_one_sees():
    one, images = network(depth=3), examples().test_inputs
    layers = list(layers_of(one, images))
    assert len(layers) == 4
    assert layers[0].maps is None
    with torch.no_grad():
        for cut, layer in enumerate(layers):
            np.testing.assert_array_equal(layer.features, one.prefix(images, cut).flatten(1))
            if cut:
                np.testing.assert_array_equal(layer.maps, one.features(images, cut - 1).mean((2, 3)))
        logits = one.head(torch.from_numpy(layers[-1].features))
        torch.testing.assert_close(logits, one(images))


def test_what_is_measured_of_which_network():
    each = ([network(seed, depth=2) for seed in (first, first + 1)] for first in (0, 2, 4))
    table = measured(**dict(zip(("networks", "untrained", "finetuned"), each, strict=True)))
    assert table.columns.tolist() == ["task", "network", "repeat", "layer", "measure", "value", "n"]
    assert set(table["task"]) == {"toy"}
    assert table.groupby("network")["layer"].unique().map(list).to_dict() == {
        "pixels": [0], "pretrained": [1, 2], "untrained": [1, 2], "finetuned": [1, 2],
    }  # fmt: skip
    found = table.groupby("network")["measure"].unique().map(set)
    every = {*ARI, *MATCHED, "linear_probe", "rank_features", "rank_weights"}
    assert found["pixels"] == {"ari_kmeans", "ari_agglomerative", "accuracy_matched", "accuracy_agglomerative",
                               "linear_probe", "rank_features"}  # fmt: skip
    assert found["pretrained"] == every
    assert found["untrained"] == found["finetuned"] == every | {"cka"}
    assert not table.duplicated(["network", "repeat", "layer", "measure"]).any()
    assert table["value"].notna().all()
    assert dict(table.groupby("measure")["n"].unique().map(list)) == {
        measure: [0 if measure == "rank_weights" else 24] for measure in every | {"cka"}
    }
    good = table[(table["network"] == "pixels") & (table["measure"] == "linear_probe")]["value"]
    assert (good > 0.8).all()  # the patterns can be told apart


def test_all_networks_of_a_repeat_are_measured_on_the_same_images():
    table = measured(networks=[network(0)], untrained=[network(0)], per_class=5)
    wide = table.pivot(index=["layer", "measure"], columns="network", values="value").drop(index=0)
    both = wide.drop(index="cka", level="measure")
    pd.testing.assert_series_equal(both["pretrained"], both["untrained"], check_names=False)
    assert wide.xs("cka", level="measure")["untrained"].tolist() == pytest.approx([1])
    assert set(table["n"]) == {0, 15}


def test_a_repeat_draws_its_own_images_and_does_not_depend_on_the_others():
    alike = [network(0)] * 3
    table = measured(networks=alike, untrained=[], per_class=4)
    values = table[table["measure"] == "rank_features"].pivot(index="layer", columns="repeat", values="value")
    assert values.loc[1].nunique() == 3
    alone = measured(networks=alike[:1], untrained=[], repeats=[2], per_class=4)
    pd.testing.assert_frame_equal(alone, table[table["repeat"] == 2].reset_index(drop=True))


def test_a_layer_that_is_dead():
    table = measured(networks=[dead()], untrained=[dead()])
    last = table[(table["layer"] == 2) & (table["network"] == "untrained")].set_index("measure")
    assert last.loc["ari_kmeans", "value"] == 0
    assert last.loc["accuracy_matched", "value"] == last.loc["linear_probe", "value"] == pytest.approx(1 / 3)
    assert last.loc["rank_features", "value"] == last.loc["rank_weights", "value"] == 0
    undefined = ["ari_agglomerative", "accuracy_agglomerative", "cka"]
    assert last.loc[undefined, "value"].isna().all()
    assert last.loc[undefined[:2], "n"].tolist() == [0, 0]


def test_images_without_a_direction_are_left_out_of_the_agglomerative_clustering():
    half = network(depth=1)
    with torch.no_grad():  # gives the brightness of a pixel where it is above 0.2
        half.convs[0].weight.zero_()
        half.convs[0].weight[:, :, 1, 1] = 1
        half.convs[0].bias.fill_(-0.2)
    data = examples()
    data.test_inputs[::5] = -1
    table = measured(networks=[half], untrained=[], examples=data).set_index(["network", "measure"])
    assert table.loc[("pretrained", "ari_agglomerative"), "n"] == 24 - 5
    assert table.loc[("pretrained", "ari_kmeans"), "n"] == table.loc[("pretrained", "ari_original"), "n"] == 24


def test_what_is_kept_is_not_measured_again(tmp_path):
    path = tmp_path / "results" / "layers.csv"
    table = measured(path=path)
    written = path.read_bytes()
    pd.testing.assert_frame_equal(measured(path=path), table)
    assert path.read_bytes() == written
    one = measured(networks=[network(0)], untrained=[network(2)], path=tmp_path / "other.csv")
    pd.testing.assert_frame_equal(one, table[table["repeat"] == 0])
    measured(path=tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_bytes() == written
    marked = pd.read_csv(path, dtype={"key": str})
    marked.loc[marked["repeat"] == 1, "value"] = 0.125
    marked.to_csv(path, index=False)
    again = measured(path=path)
    assert (again.loc[again["repeat"] == 1, "value"] == 0.125).all()


def test_other_networks_are_measured_again_and_other_tasks_kept(tmp_path):
    path = tmp_path / "layers.csv"
    first = measured(path=path, task="first")
    measured(path=path)
    changed = measured(path=path, networks=[network(0), network(7)])
    pd.testing.assert_frame_equal(changed, measured(networks=[network(0), network(7)]))
    pd.testing.assert_frame_equal(measured(path=path, task="first"), first)
    assert pd.read_csv(path).groupby("task", sort=False).size().tolist() == [len(first)] * 2
    fewer = measured(path=path, per_class=4)
    assert set(fewer["n"]) == {0, 12}


def test_values_that_are_missing_survive_the_file(tmp_path):
    path, options = tmp_path / "layers.csv", {"networks": [dead()], "untrained": []}
    table = measured(path=path, **options)
    assert table["value"].isna().any()
    pd.testing.assert_frame_equal(measured(path=path, **options), table)


@pytest.mark.parametrize(
    "content", ["", "task,network\n", "task,network,repeat,layer,measure,value,n,key\na,b,c,d,e,f,g,h\n"]
)
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "layers.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"layers\.csv"):
        measured(path=path)


def test_what_cannot_be_measured_is_named():
    broken = network(1)
    with torch.no_grad():
        broken.convs[0].bias[0] = float("nan")
    with pytest.raises(InputError, match=r"untrained .* repeat 5 "):
        measured(networks=[network(0)], untrained=[broken], repeats=[5])
    data = examples()
    fewer = data.test_labels != 1
    lacking = Examples(data.inputs, data.labels, data.test_inputs[fewer], data.test_labels[fewer], classes=3)
    with pytest.raises(InputError, match=r"'bee' .* test "):
        measured(examples=lacking)
