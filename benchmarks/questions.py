# ruff: noqa: E501 (prose, a sentence a line)
"""What the generated pages say beside the figures: the questions, each claim in plain words, captions of figures.

No number that was measured stands here: those come from the result files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A section of the pages."""

    title: str
    text: str  # what a reader should know before the tables
    claims: tuple[str, ...]  # ids of the claims that answer it
    results: tuple[str, ...]  # experiments whose tables stand in the section
    figures: tuple[str, ...] = ()  # files in ``docs/figures``, without their ending


@dataclass(frozen=True)
class Words:
    """A claim in plain words: its title, what was measured on what, and what is known of why it was missed.

    ``below_zero`` is what its value is called where it is below zero, in place of its unit.
    """

    title: str
    what: str
    missed: str = "what is missing stands in what was measured."
    below_zero: str = ""


@dataclass(frozen=True)
class Caption:
    """What a figure shows, for those who see it and for those who do not."""

    text: str
    alternative: str


# Experiments on networks narrower or smaller than their name says; every row and claim of theirs says so.
NARROW = {
    "joint_resnet34": "a quarter of the paper's width",
    "filters_vgg16": "a quarter of VGG-16's width",
    "sparse_vgg16": "a quarter of VGG-16's width",
    "strangers": "small networks, random weights",
    "zoo": "small networks, random weights",
    "never_slower": "small networks, random weights",
    "tolerances": "networks of 18 to 176 thousand parameters, trained on digits",
    "heads": "MiniLM with its weights, a ViT and a Llama with random ones",
}

QUESTIONS = (
    Question(
        "What does a user get, and what would they have got otherwise?",
        'Trained networks, unlabelled training inputs and a budget; no weight is trained. "auto" is the call with '
        '`methods="auto"`, a single method one of ours alone, a peer what others do, run from its package or written from its '
        "description; of a peer, uniform says that every layer keeps the same share. Each cell names the best by the test "
        "data, which favours peers and single methods: there are several of them. ± is one standard error of the test. "
        "Claims call each of these ways an arm.",
        ("A1", "A1 (ResNet-20)", "A1 (ResNet-20, time)", "A2", "A3", "A6"),
        ("headline", "tolerances", "auto"),
    ),
    Question(
        "What is lost without training?",
        "A trained network, some unlabelled images and a budget; no weight is trained afterwards. Accuracy is that on the "
        "10,000 test images of CIFAR-10, which were looked at once for each row. A test of 10,000 images has a standard "
        "error of 0.3 points near 90 %.",
        ("F2", "R9", "R3", "A2 (ResNet-20)"),
        ("front_rows", "front_neighbours", "resnet20_oneshot", "chains"),
        ("front-resnet20",),
    ),
    Question(
        "What does a short training bring back?",
        "The compressed network is trained for a few epochs, the dense one being its teacher. The targets were set for "
        "40 epochs and three seeds, which take days on two cores; what was run is in each row.",
        ("F1", "F3", "F4", "F5"),
        ("demo", "resnet20_finetune", "resnet56_finetune"),
        ("accuracy-resnet20", "accuracy-resnet56"),
    ),
    Question(
        "Is the network really faster, and is the budget kept?",
        "Times of whole networks, dense and compressed in turns on one machine. They hold for the machine, the number of "
        "threads and the batch of the row.",
        ("F6", "F7", "L7", "A4"),
        ("speed_32", "speed_224", "latency_budget", "budgets", "never_slower"),
        ("time-against-macs",),
    ),
    Question(
        "How long does compression take, and how much memory?",
        "A pass is one forward pass of the calibration data through the dense network, so that the figures mean something "
        "on another machine.",
        ("F8", "F9", "R4", "R5", "R6", "R7", "R8", "A5", "N5"),
        ("analysis", "memory", "one_pass", "selection_speed", "sparse_fits", "search_time"),
    ),
    Question(
        "Do the statistics depend on how the data come?",
        "The same images in other batches, and the same network with its hidden channels in other units, must give the "
        "same compressed network.",
        ("R1", "R2", "R10"),
        (),
    ),
    Question(
        "What do ranks learned in training add?",
        "Weights are trained and ranks chosen in turns, after Idelbayev and Carreira-Perpiñán (CVPR 2020), within a stated "
        "budget. A C step is the choice of all ranks for the present weights.",
        ("L1", "L2", "L3", "L4", "L5", "L6"),
        (
            "c_step", "c_step_time", "rank_paths_lenet300", "rank_paths_lenet300_from0", "rank_paths_resnet20",
            "resnet20_learned", "resnet56_learned", "vgg",
        ),
        ("rank-paths-lenet300", "rank-paths-lenet300-from0", "rank-paths-resnet20"),
    ),
    Question(
        "What does it bring that layers share a factor?",
        "Several layers store one thin layer in common, after Chen et al. (Neurocomputing 2023): RJSVD shares the second of "
        "two, LJSVD the first, Bi-JSVD a part of both.",
        ("J1", "J2", "J3", "J4", "J5", "J6"),
        ("joint_counts", "joint_resnet20", "joint_resnet56", "joint_resnet34", "joint_latency", "joint_minilm"),
    ),
    Question(
        "What does a sparse correction bring?",
        "A layer becomes two thin layers plus a sparse one, fitted together to the layer's responses. The idea is that of "
        "Yu et al. (CVPR 2017).",
        ("S1", "S2", "S3", "S4", "S5", "S5 (pass)", "S6"),
        (
            "bilateral_speed", "planted", "small_samples", "sparse_resnet20", "sparse_resnet56", "sparse_vgg16",
            "whole_pass", "sparse_kernels",
        ),
        ("error-against-samples", "low-rank-step-speed"),
    ),
    Question(
        "What does removing filters bring?",
        "Whole channels go, and the layers that read them are corrected. How many may go is read off the spectrum of the "
        "responses, after Suau et al. (WACV 2020).",
        ("P1", "P2", "P2 (ResNet-56)", "P3", "P4", "P5", "P6", "P7", "A7"),
        (
            "filter_oracles", "filters_resnet20", "filters_resnet56", "filters_resnet56_training", "filters_vgg16",
            "domains", "zoo", "filter_speed", "heads",
        ),
    ),
    Question(
        "Does it work on networks and files that it has never seen?",
        "Networks of many kinds are compressed by every method and then run, saved, loaded, merged and exported; files are "
        "changed at random; processes are killed while they write.",
        ("N1", "N2", "N3", "N4", "N6"),
        ("strangers",),
    ),
    Question(
        "What does a stranger see first?",
        "The README, the demo, the pages, the messages and the types, each measured by a script.",
        ("D1", "D2", "D3", "D4", "D5", "D6"),
        ("door",),
    ),
    Question(
        "Is the code in order?",
        "Figures of the source itself.",
        ("H1", "H2", "H3", "H4", "H5", "H6"),
        ("house", "house_golden", "house_suite"),
    ),
)  # fmt: skip

# Claims of such experiments that are not about networks.
NO_NETWORK = ("N3", "N4")

_SHORT = "The target was set for many more epochs than were run, and for several seeds; the run in full takes days on two cores."
_NARROW = "It was run on a network of a quarter of the width, which has less to spare than the paper's; the full one takes days on two cores."

WORDS = {
    "F1": Words(
        "The demo trains, compresses and fine-tunes a digit classifier",
        "The whole demo on scikit-learn's digits with fresh seeds, on a split that no setting was chosen on.",
        "The dense network of one seed is the best of the three, and its compressed one loses three "
        "test images of 449, one more than the limit allows; the other two gain. Three seeds do not tell more.",
    ),
    "F2": Words(
        "ResNet-20 on CIFAR-10, no training",
        "Test accuracy of a given ResNet-20 (dense 91.73 %) after one call on 4,000 unlabelled images, at three budgets of "
        "multiply-accumulates.",
    ),
    "A1": Words(
        "Methods that compete against each method alone",
        "The test metric of `methods=\"auto\"` against the best of the single methods at the same network and budget.",
        "the headline has not been run whole. Where it was run, auto is never worse, and better where several methods have "
        "something to give: on MiniLM, not on ResNets, where CP alone loses least of MACs, and low rank + sparse of bytes on the larger one.",
    ),
    "A2": Words(
        "Methods that compete against the best peer",
        "The test metric without training, from the same weights and the same unlabelled inputs.",
        "the headline has not been run whole: a third of the networks and budgets are missing.",
    ),
    "A3": Words(
        "A text detector 15 times smaller",
        "CRAFT, VGG-16 at full width, on pages that are drawn; of each budget the methods that are best on held-out pages. The "
        "pages are easy for it: words in a row, upright, in eight fonts.",
        "in eager mode pooling, BatchNorm and activations at the page's full size take the time that they took; ONNX "
        "Runtime and torch.compile, which merge some of them, save more than is asked; no hour of training was at hand, and a few steps made the detector "
        "worse than none.",
        "points of F-score gained at the worst of the budgets, without training: less than the standard error of the test",
    ),
    "A4": Words(
        "Never slower under a guard",
        "Twelve architectures at batch 1 and 16 in torch's eager mode, `torch.compile` and ONNX Runtime: finished networks timed "
        "anew beside the dense ones, in turns; slower is what is so beyond noise, twice.",
    ),
    "A5": Words(
        "Time of a search among sets of methods",
        "The whole call with `methods=\"auto\"` on ResNet-50 at 224 x 224 with 128 images; the row says how many seconds it "
        "was given.",
        "Most of it goes into the set that removes filters, whose plans are tried one after the other on the calibration "
        "data; what has begun when the seconds are over is finished.",
    ),
    "A6": Words(
        "A tolerance in place of a budget",
        "Five networks and four tolerances of lost accuracy: whether what is returned holds on the held-out data that it "
        "was judged by, and its multiply-accumulates against the smallest network of a fine sweep of budgets that holds.",
        "at budgets that low rank cannot meet the sweep has all sets of methods compete, and on the perceptron filters hold "
        "the tolerance with little more than half of the MACs. A tolerance asks other sets only where the smallest network of "
        "the default's methods holds it, and says elsewhere that they may need less. What is lost goes up and down with the size: once a smaller network held behind larger ones "
        "that did not.",
    ),
    "A1 (ResNet-20)": Words(
        "Methods that compete against each arm, by the judge",
        "Divergence from the dense ResNet-20 on the calibration images that were held out, of what `methods=\"auto\"` returns "
        "and of each arm alone, in standard errors of the former.",
    ),
    "A1 (ResNet-20, time)": Words(
        "What methods that compete cost",
        "CPU time of the whole call on 256 images, calibration included, against that of low rank alone.",
        "most of it is the table and the fits of the chains that are chosen, which low rank alone does without. Every row finds "
        "anew what methods offer; former runs took it over from the first row, which made the later ones look cheaper.",
    ),
    "A2 (ResNet-20)": Words(
        "ResNet-20 on CIFAR-10, no training, with chains of three layers on offer",
        "Test accuracy after one plan on 1,024 unlabelled images with low rank, CP and Tucker-2 in one table, at three "
        "budgets of multiply-accumulates. Arms were compared on held-out training images.",
    ),
    "F3": Words("ResNet-20 on CIFAR-10, fine-tuned", "Test accuracy after fine-tuning with the dense teacher.", _SHORT),
    "F4": Words("ResNet-56 on CIFAR-10, fine-tuned", "Test accuracy after fine-tuning with the dense teacher.", _SHORT),
    "F5": Words(
        "Lead over Torch-Pruning",
        "Both start from the same weights and are trained by the same loop for the same epochs; Torch-Pruning 1.6.1 removes "
        "channels by group magnitude.",
        "It is ahead, by less than was asked for; fewer epochs than planned, one seed, and one of the budgets was not run.",
    ),
    "F6": Words(
        "Time saved against work saved",
        "The share of the time that is saved, over the share of the multiply-accumulates that is saved: two networks, two "
        "budgets and two batch sizes at each of two image sizes, on the CPU.",
        "The cases that miss are VGG-16 at 224 x 224 and batch 16. Two thin layers write and read one map more than the layer "
        "that they replace.",
    ),
    "F7": Words(
        "A budget in milliseconds is met",
        "Half the dense time was asked for; the finished ResNet-18 and VGG-16 were measured beside the dense ones.",
    ),
    "F8": Words(
        "Seconds of the analysis of ResNet-50 at 224 x 224",
        "Calibration, the table of all options by two methods, and the exact choice, on two cores.",
        "The table and the choice hold. Calibration multiplies the patches of every layer, up to 4,608 numbers, beside the "
        "forward pass.",
    ),
    "F9": Words(
        "Memory of the analysis of ResNet-50 at 224 x 224",
        "The peak above that of plain forward passes.",
        "What is held beside the moments while layers are decomposed is more than the two copies of the largest weight that "
        "the limit allows.",
    ),
    "H1": Words("Twenty cases give what they gave before", "Plans, tables, weights and outputs, bit for bit."),
    "H2": Words(
        "Minutes of the test suite",
        "The whole suite in one process.",
        "When it was met there were 5,308 tests, which knew fewer networks and data; since then more were added than could be made "
        "cheap. In two processes, as `make test` runs it, it stays within.",
    ),
    "H3": Words(
        "Shape of the source",
        "Modules in the root, imports between rooms, the longest function, the most branches and parameters.",
        "One function takes more parameters than it should.",
    ),
    "H4": Words(
        "Lines of the source",
        "All lines of `src`.",
        "What was added since is more than what was taken out.",
    ),
    "H5": Words("Extensions from outside", "Methods, costs and selectors written in the tests alone, without a change in `src`."),
    "H6": Words("The library starts quickly", "`import spectrim` and `spectrim --help` as whole processes."),
    "J1": Words(
        "Ranks and compression factors of the paper",
        "Every factor and rank that the paper prints, counted as it counts.",
    ),
    "J2": Words("Operations of the paper", "Every figure of the paper's CIFAR-10 table, to the digits printed."),
    "J3": Words(
        "Shared and separate factors in one table",
        "Equal parameters and epochs: separate pairs, shared factors, and the mix that one table chooses.",
    ),
    "J4": Words("ResNet-34 with shared factors", "Points lost on CIFAR-10 at two ratios of parameters.", _NARROW),
    "J5": Words(
        "Time of sharing both factors",
        "The whole network with a part of both factors shared, against one with the first shared, at equal parameters.",
        "The worst of the sixteen cases is just over the limit.",
    ),
    "J6": Words(
        "Shared factors in a sentence encoder",
        "Errors of MiniLM's layers on held-out text, shared against separate, at equal parameters.",
    ),
    "L1": Words(
        "The choice of ranks is the exact one",
        "Random cases against a search over every rank, and the authors' own figures; and the time of the choice.",
    ),
    "L2": Words(
        "Ranks settle as in the paper",
        "The sum of all ranks from the first choice to the last, at a multiplier given by hand.",
        "With the penalty that the paper starts at, this network's ranks do not begin near 0; with one that starts lower they "
        "do, and both end at the same sum.",
    ),
    "L3": Words("ResNet-20 with learned ranks", "Test accuracy at six budgets.", _SHORT),
    "L4": Words("ResNet-56 with learned ranks", "Test accuracy at four budgets.", _SHORT),
    "L5": Words(
        "VGG-16 with learned ranks against ResNets",
        "The paper's headline: a compressed VGG-16 is faster than a ResNet of nearly the same error.",
        "The time holds; the accuracy was not run, since it takes training VGG-16 from scratch.",
    ),
    "L6": Words(
        "Learned ranks against one-shot plans",
        "The same budget and nearly the same epochs in all.",
        "There is no gain to report, and one seed where two were asked for. So `compress` stays the default.",
    ),
    "L7": Words(
        "A stated budget is what the network costs",
        "Parameters, multiply-accumulates, bytes and milliseconds of finished networks, over what was asked for.",
        "The three counted budgets hold; the measured time is over by less than it varies from run to run.",
    ),
    "N1": Words("Situations in which networks are brought", "Each by every method, saved, loaded, merged and exported."),
    "N2": Words(
        "Networks that strangers bring",
        "Architectures from their configurations, each by default, by filters, by shared factors and by sparse corrections.",
        "The networks that came out wrong are in the table, with what is wrong.",
    ),
    "N3": Words("Files with something changed in them", "Checkpoints, models, plans and caches, mutated at random."),
    "N4": Words(
        "Commands that write are killed",
        "Every command and call that writes, killed at a random moment.",
        "One fault that the run found was mended after it; some commands were not killed often enough for want of time.",
    ),
    "N5": Words("What the proof of a network costs", "Forward passes that checking the finished network takes."),
    "N6": Words("Models of transformers ship", "Saving, loading, training on, adapters and generating."),
    "P1": Words("The analysis equals the published one", "Widths, orders and errors against the authors' implementation."),
    "P2": Words(
        "ResNet-20 with 30 % fewer multiply-accumulates by removing filters, not trained",
        "Test accuracy against removal by magnitude, by Torch-Pruning and at random; the target counts those as they are, "
        "without new statistics of the normalisation.",
    ),
    "P2 (ResNet-56)": Words(
        "ResNet-56 with 30 % fewer multiply-accumulates by removing filters, not trained",
        "The same on a deeper network.",
        "It cannot be met: the dense network itself is ahead of the best of the others by less than was asked for.",
    ),
    "P3": Words("ResNet-56, filters removed and trained", "Test accuracy, the dense network being the teacher.", _SHORT),
    "P4": Words("VGG-16 with an eighth of the parameters", "Accuracy over the dense network's, on CIFAR-10.", _NARROW),
    "P5": Words(
        "Filters for a part of the classes",
        "ResNet-20 calibrated on the animals or on the vehicles of CIFAR-10, and tested on both.",
    ),
    "P6": Words("Filters removed from many architectures", "Pruned, or passed over with the reason; run and compared."),
    "P7": Words("Time of the analysis of filters", "A layer of 512 filters, and the whole of ResNet-50."),
    "A7": Words(
        "Heads of attention and feed-forward widths", "Half of them removed, against the dense network with zeroed ones."
    ),
    "R1": Words(
        "The same images in other batches",
        "Accuracy of ResNet-20 and errors of the table for 512 images cut into batches of several sizes.",
    ),
    "R2": Words(
        "Hidden channels in other units",
        "A network whose channels are rescaled over twelve decades.",
    ),
    "R3": Words(
        "Layers are fitted to what the layers before them deliver",
        "With and without this, on data that was not fitted to.",
    ),
    "R4": Words(
        "Time of a whole call",
        "`compress` from end to end, in forward passes of its data.",
        "Fitting the layers takes most: two of the passes are the networks', the rest are the moments of what each layer sees and "
        "the equations solved with them.",
    ),
    "R5": Words(
        "Work grows with depth, not with its square",
        "Layer calls of networks of 12, 48 and 200 layers.",
        "It is linear. Both networks side by side call a layer about twice a batch, and no other pass takes a whole batch; "
        "checks on single samples (copies, sums, the finished and the merged network) count as whole calls.",
    ),
    "R6": Words(
        "Time of calibration",
        "In forward passes of its data.",
        "Taking second moments of wide patches costs more than the pass itself.",
    ),
    "R7": Words(
        "Time of the table with sensitivity",
        "ResNet-50 at 224 x 224.",
        "It is missed by about a hundredth, which is less than runs differ; F8 was another machine.",
    ),
    "R8": Words("Low rank plus sparse beside OATS and GoDec", "Errors and times of single layers."),
    "R9": Words(
        "CIFAR ResNets, default call",
        "Test accuracy after one call with 1,024 unlabelled images and nothing else said.",
        "ResNet-20 stays below its targets, most at 13.5 MMAC; ResNet-56 reaches its own. With chains of three layers on offer, "
        "which often take longer than their work says, ResNet-20 is above them (A2).",
    ),
    "R10": Words("Earlier figures run again", "The published rows, beside the old ones."),
    "S1": Words(
        "A low-rank step without decompositions",
        "Time of the step against that with a singular value decomposition, at a slightly larger objective.",
        "At the highest ranks there is less to save; below them it holds.",
    ),
    "S2": Words(
        "Planted weights are found again",
        "Low rank plus sparse weights that are known, seen through correlated inputs and noise.",
    ),
    "S3": Words(
        "How many samples are enough",
        "Error on held-out images against the number of calibration samples, three layers of ResNet-56.",
        "Two of the layers are at rest before the end; the widest still gains at the most samples that were tried.",
    ),
    "S4": Words(
        "Low rank plus sparse against each alone",
        "Accuracy of ResNet-20 at equal stored bytes.",
        "It is ahead of low rank everywhere, and a little behind the best of the other ways at one of the points.",
    ),
    "S5": Words("VGG-16 in a fifteenth of the bytes", "Points lost on CIFAR-10.", _NARROW),
    "S5 (pass)": Words(
        "A whole pass over networks of ImageNet's shapes", "Time and memory, random weights.",
        "Three quarters of VGG-16's weights are one linear layer's: arrays of 400 to 800 MB are read again in every turn. "
        "Of its time fitting the layers in order takes 60 %, tabulating 37 %.",
    ),
    "S6": Words(
        "The kernel of a sparse layer is chosen by measuring",
        "A linear layer of 4096 x 4096 as low rank plus sparse: the chosen kernel against the fastest.",
    ),
    "D1": Words(
        "The README is short",
        "Lines, words before the references, the line of the first code, terms that are not explained.",
        "The row says which of the four.",
    ),
    "D2": Words("From nothing to a first model", "A fresh clone, and an empty environment with the wheel."),
    "D3": Words("Pages in a browser", "Two widths, light and dark: scrolling, errors, requests, accessibility."),
    "D4": Words("Typical mistakes", "Each is answered by one sentence with the cure, before any work."),
    "D5": Words("Examples and notebook run", "In the test suite."),
    "D6": Words("Types of a user's script", "Under mypy and pyright, and what an editor offers."),
}  # fmt: skip

CAPTIONS = {
    "front-resnet20": Caption(
        "ResNet-20 on CIFAR-10 after compression **without training**, by test accuracy (higher is better) against the work "
        "left, in multiply-accumulates of one image. Every way starts from the same weights and the same 1,024 unlabelled "
        "images; the others are shown with normalisation statistics estimated anew wherever that is better. BALF is "
        "re-implemented from its description, CP is TensorLy's decomposition at equal shares.",
        "Line chart: with less work left, accuracy falls slowest for Spectrim, then CP, then BALF, and fastest for "
        "Torch-Pruning",
    ),
    "accuracy-resnet20": Caption(
        "ResNet-20 on CIFAR-10, test accuracy against multiply-accumulates (MACs), without and with training. Bars are one "
        "standard error of a test of 10,000 images; crosses are the published figures of learned ranks, after some 950 epochs.",
        "Line chart of test accuracy of ResNet-20 against million multiply-accumulates for five ways of compressing",
    ),
    "accuracy-resnet56": Caption(
        "The same for ResNet-56.",
        "Line chart of test accuracy of ResNet-56 against million multiply-accumulates",
    ),
    "time-against-macs": Caption(
        "Share of the time saved against share of the work saved, whole networks on the CPU. On the diagonal a network "
        "saves as much time as work; the dashed line is 0.8 of that, the target of F6.",
        "Line chart: share of the time saved against share of the multiply-accumulates saved for four networks and sizes",
    ),
    "error-against-samples": Caption(
        "What three layers of ResNet-56 lose on held-out images, against the samples that they were fitted to. The dashed "
        "line is the number of inputs of the layer: with fewer samples than inputs the fit is poor.",
        "Three line charts: held-out error of a layer falls with the number of calibration samples and levels off",
    ),
    "low-rank-step-speed": Caption(
        "How many times faster the low-rank step without decompositions is, against a singular value decomposition and "
        "against our own eigendecomposition, by the rank. The dashed line is the target of S1.",
        "Line chart: the step without decompositions is faster at every rank, less so at high ranks",
    ),
    "rank-paths-lenet300": Caption(
        "Ranks over the steps of learning (left to right), LeNet300 on Fashion-MNIST, with the penalty that the paper "
        "starts at: a row for each layer, darker is a higher rank; the costs and errors below.",
        "Map of the ranks of three layers over thirty steps, with lines of cost and error below",
    ),
    "rank-paths-lenet300-from0": Caption(
        "The same with a penalty that starts lower: ranks begin at 0 and end at the same sum.",
        "Map of the ranks of three layers over the steps, from zero upward, with lines of cost and error below",
    ),
    "rank-paths-resnet20": Caption(
        "The same for ResNet-20 on CIFAR-10, a row for each convolution.",
        "Map of the ranks of nineteen layers over fifty steps, with lines of cost and error below",
    ),
}
