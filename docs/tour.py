# The source of tour.ipynb, which `python scripts/tour.py` makes and runs. Each `# %%` begins a cell.

# %% [markdown]
# # An hour with reuse
#
# A diffusion model paints a picture by calling one U-Net many times; here it makes 20 calls. From one call to the next
# the latents change a little, so perhaps a good part of what a call computes was computed a moment ago. This notebook
# follows one idea from there: **keep a tensor at one call and use it again at the next.** The tensors are first of all
# attention maps, as in the paper on HURRY and PHAST ([arXiv 2401.01008](https://arxiv.org/abs/2401.01008)), and later
# others. The two names are the paper's: HURRY is a rule of thumb for which calls reuse, and PHAST is what a search
# finds that begins at HURRY and perturbs it.
#
# One question runs through all sections: **is a run with reuse worth more than a shorter run without it?** It has two
# halves. How close does reuse come to the picture of the full sampler (sections 3 to 5, and 8)? How much time does it
# save (sections 2 and 7)? Section 10 puts the halves together.
#
# You should know what a U-Net and attention are. Everything runs on a small model of landscapes that comes with the
# package. Each number in a sentence is computed by the cell above it: run the notebook, and the sentences follow what
# your machine finds. Everything runs on the CPU. A GPU has other kernels and other memory, so its times may differ, and
# with them the answer. The last cell says how long the notebook took.

# %%
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

import minireuse
from minireuse.cache import ReuseCache
from minireuse.plan import PLAIN, PREDICTION, PlanError, ReusePlan, StepPlan
from minireuse.policies import hurry, interval, phast, random, select
from minireuse.search import Renderer, plans_of, search

pipe = minireuse.load(device="cpu")
PROMPTS = [
    "snowy hills with two pines, a red house and mountains at sunset",
    "green hills with three oaks, a lake and clouds at noon",
]
SEEDS = [0, 1]
STEPS = 20  # of DDIM, which makes one U-Net call in each
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 90}


def say(sentence):
    display(Markdown(sentence))


def show(rows, titles, sides, inches=1.25, largest=False):
    """Pictures in rows. titles: of the columns, sides: of the rows. largest: write the largest value below each."""
    size = (inches * len(rows[0]) + 0.9, inches * len(rows) + 0.3)
    _, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False, layout="constrained")
    for row, side, line in zip(rows, sides, axes, strict=True):
        line[0].set_ylabel(side, rotation=0, ha="right", va="center", fontsize=9)
        for picture, axis in zip(row, line, strict=True):
            axis.imshow(picture, cmap="viridis")  # colours of maps: dark is 0 or the smallest value, yellow the largest
            axis.set(xticks=[], yticks=[])
            if largest:
                axis.set_xlabel(f"yellow: {picture.max():.2g}", fontsize=8)
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    plt.show()


def psnr(images, references):
    """How close each picture is to its reference, in dB."""
    error = (images.astype(float) - references).reshape(len(images), -1) ** 2
    return 10 * np.log10(255**2 / np.maximum(error.mean(axis=1), 1e-6))


say(f"The model has {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} million parameters in its U-Net.")
say(f"Its guidance scale is {pipe.guidance_scale:g} where nothing else is asked for.")

# %% [markdown]
# Pictures are compared by their **PSNR**, in dB: the mean squared difference of their pixels, on a logarithmic scale.
# As a rule of thumb, a difference at 20 dB is easy to see, at 30 dB hard to see, and at 40 dB next to impossible. Most
# runs below lie above 30 dB, so you will hardly see which of them is better. The contest still matters. Every dB can be
# traded: a plan that stays closer in the same time may reuse in more calls, and so be faster, at the same distance.
#
# ## 1. A picture from noise, call by call
#
# Each call takes noisy latents `x` and says which noise it sees in them. Without that noise they would be `x_0`, the
# guess at the clean picture. DDIM moves a bit of the way towards the guess and calls again. The upper row shows the
# latents after some of the calls, decoded to pixels; the lower row shows the guess of that call.

# %%
steps = []
full = pipe.generate(PROMPTS, seeds=SEEDS, steps=STEPS, on_step=steps.append)

shown = [0, 1, 3, 5, 8, 12, 19]
latents = [pipe.to_images(steps[call].x[:1])[0] for call in shown]
guesses = [pipe.to_images(steps[call].x_0[:1])[0] for call in shown]
show([latents, guesses], [f"call {call}" for call in shown], ["latents", "guess"])

closeness = psnr(np.stack(guesses), full.images[:1])
say("The guess is this close to the final picture, in dB: ")
say(" · ".join(f"call {call}: **{value:.1f}**" for call, value in zip(shown[:-1], closeness, strict=False)))

# %% [markdown]
# **Classifier-free guidance** doubles the work: each call runs the U-Net on a batch of two, once without the prompt and
# once with it. The noise that the call reports is `without + scale * (with - without)`. With a **guidance scale** of 1
# that is the second answer. With a larger scale, as here, it lies on the line from the first through the second, far
# beyond the second. So the picture follows its prompt more closely.
#
# ## 2. Where the time goes
#
# Attention computes `softmax(q kᵀ / √d) v`. The softmax is the **map**: for each place in the picture, how much it
# looks at each other place (self-attention) or at each token of the prompt (cross-attention). The bar takes a call
# apart, with every map written out to memory, which is how attention was computed before fused kernels. Such attention
# is called **explicit**, and `StepPlan(explicit=True)` asks for it.

# %%
config = pipe.unet.config
latent = torch.randn(2, 4, *pipe.latent_size(), generator=torch.Generator().manual_seed(0))
text = pipe.unet.text_kv(pipe.text.encode(["", PROMPTS[0]]))
HEAD_WIDTH = config.block_out_channels[0] // config.heads[0]  # of a query; the same in every attention of this model


def part_of(operation, shapes):
    """What an operation of torch is for."""
    if "conv" in operation:
        return "convolutions"
    if "softmax" in operation:
        return "softmax"
    if operation == "aten::bmm":
        return "scores q kᵀ" if shapes[0][-1] == HEAD_WIDTH else "map times values"
    if operation in ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::_linear_pointwise"):
        weight = [shape for shape in shapes if len(shape) == 2][-1]
        return "projections of q, k, v, output" if weight[0] == weight[1] else "feed-forward layers"
    return "norms, activations, copies"


PARTS = {
    "convolutions": GRAY,
    "feed-forward layers": "#AAAAAA",
    "norms, activations, copies": "#DDDDDD",
    "projections of q, k, v, output": GREEN,
    "scores q kᵀ": BLUE,
    "softmax": "#56B4E9",
    "map times values": ORANGE,
}
with torch.inference_mode():
    pipe.unet(latent, 500, text, StepPlan(explicit=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(5):
            pipe.unet(latent, 500, text, StepPlan(explicit=True))
took = dict.fromkeys(PARTS, 0.0)
for event in profiler.key_averages(group_by_input_shape=True):
    took[part_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 5000  # milliseconds of one call

figure, axis = plt.subplots(figsize=(8, 1.9), layout="constrained")
left = 0
for part, colour in PARTS.items():
    axis.barh(0, took[part], left=left, color=colour, edgecolor="white", label=part)
    left += took[part]
axis.set(xlabel="milliseconds of processor time in one guided call", yticks=[], xlim=(0, left))
axis.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
plt.show()
mapping = (took["scores q kᵀ"] + took["softmax"]) / left
say(f"Scores and softmax, which make the map, take **{mapping:.0%}** of the call. A call that is given its maps")
say("also needs no queries and keys. It still needs the values, the output projection, and all that is gray.")

# %% [markdown]
# ## 3. Two neighbouring maps
#
# `watch` is an argument of `generate`: a function that sees the scores of every attention before the softmax. Here it
# keeps some of the maps of the first picture, and it writes down for every layer how much the map has changed since the
# call before: the sum of all differences, divided by the sum of the map. Only the half with the prompt is looked at.
# The lower row shows which places look at the word "house". The upper row takes the place that does so most, and shows
# where else it looks.
#
# A tensor that can be kept is called a **site**. It has an **address**, which is the path of its layer in the U-Net,
# and a **kind**, which here is `map`.

# %%
maps = select(pipe.sites)  # all attention maps: (address, kind) of each
SELF, CROSS = (site for site in maps if site.address.startswith("up_blocks.3.attentions.1."))
last, shapes, change, kept, heat = {}, {}, {}, {}, []
STORED = 9  # the call whose maps HURRY keeps
held_by_hurry, aged = {}, {}  # for section 5: its maps, and how far they are from those that follow
beyond, added_up = {}, {}  # for section 8: the errors of extrapolated maps, and the sums of errors


def look(site, call, scores):  # scores (2, heads, places, places or tokens), the half without a prompt first
    probs = scores[1].softmax(dim=-1)
    shapes[site] = tuple(scores.shape)
    earlier = last.get(site, [])
    if earlier:
        change[site, call] = float((probs - earlier[-1]).abs().sum() / probs.sum())
    if call == STORED:
        held_by_hurry[site] = probs
    if call > STORED:
        aged[site, call] = float((probs - held_by_hurry[site]).abs().sum() / probs.sum())
    if len(earlier) == 3:  # the line through the maps of calls - 3 and - 1
        line = earlier[-1] + (earlier[-1] - earlier[0]) / 2
        beyond[site, call] = float((probs - line).abs().sum() / probs.sum())
        if call % 2:  # what an even plan would have reused; errors with their signs
            held_error, line_error = added_up.get(site, (0, 0))
            added_up[site] = held_error + (probs - earlier[-1]), line_error + (probs - line)
    last[site] = [*earlier[-2:], probs]
    if site in (SELF, CROSS):
        kept[site, call] = probs.mean(dim=0).numpy()  # (places, places or tokens), the mean of the heads
    if site.is_cross and scores.shape[2] >= 256:
        side = int(scores.shape[2] ** 0.5)
        picture = probs.mean(dim=0).T.reshape(1, -1, side, side)
        heat.append(torch.nn.functional.interpolate(picture, size=(32, 32), mode="bilinear")[0])


pipe.generate(PROMPTS[0], seeds=SEEDS[0], steps=STEPS, watch=look)

words, places = [], []  # the words of the prompt, and the numbers of their tokens
for number, piece in enumerate(pipe.text.pieces(PROMPTS[0]), start=1):
    if words and not words[-1].endswith("</w>"):
        words[-1], places[-1] = words[-1] + piece, [*places[-1], number]
    else:
        words.append(piece)
        places.append([number])
words = [word.removesuffix("</w>") for word in words]
tokens = dict(zip(words, places, strict=True))

mean_heat = torch.stack(heat).mean(dim=0).numpy()  # (tokens, 32, 32)
house = int(mean_heat[tokens["house"]].sum(axis=0).argmax())  # the place that looks most at this word
A, B = 8, 9  # two neighbouring calls
own = [kept[SELF, call][house].reshape(32, 32) for call in (A, B)]
word = [kept[CROSS, call][:, tokens["house"]].sum(axis=1).reshape(32, 32) for call in (A, B)]
titles = [f"call {A}", f"call {B}", "difference"]
sides = ["self: where one\nplace looks", 'cross: who looks\nat "house"']
say(f"The model has {len(maps)} maps. Those shown are at `{SELF.address}` (self) and `{CROSS.address}` (cross).")
show([[a, b, abs(b - a)] for a, b in (own, word)], titles, sides, inches=1.5, largest=True)

difference = {name: change[site, B] for name, site in (("self", SELF), ("cross", CROSS))}
say(
    f"From call {A} to call {B} this self-attention map changes by **{difference['self']:.2f}**, and this "
    f"cross-attention map by **{difference['cross']:.2f}**. The scale runs from 0 (unchanged) to 2 (no overlap)."
)

# %% [markdown]
# Each picture has a colour scale of its own, and so has the difference; the number below is the value that is yellow.
# Over all layers:

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
calls = np.arange(1, STEPS)
for name, colour, marker, cross in (("self-attention", BLUE, "o", False), ("cross-attention", ORANGE, "s", True)):
    rows = np.array([[change[site, call] for call in calls] for site in maps if site.is_cross == cross])
    axis.fill_between(calls, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.15)
    axis.plot(calls, rows.mean(axis=0), color=colour, marker=marker, markersize=4, label=f"{name}: mean and range")
by_call = [np.mean([change[site, call] for site in maps]) for call in calls]
axis.plot(calls, by_call, color="black", ls="--", lw=1.5, label="all layers: mean")
axis.set(xlabel="call", ylabel="change of the map\nsince the call before", xticks=calls, ylim=(0, None))
axis.legend(fontsize=8)
plt.show()
say(
    f"The mean change over all layers lies between {min(by_call):.2f} (call {calls[np.argmin(by_call)]}) and "
    f"{max(by_call):.2f} (call {calls[np.argmax(by_call)]}), on the scale from 0 (unchanged) to 2 (no overlap)."
)

# %% [markdown]
# Cross-attention maps also tell what the words do. Here is, for some words of the prompt, which places look at them:
# the mean over all calls and over the layers of the two finest resolutions.

# %%
chosen = [word for word in ("snowy", "pines", "house", "mountains", "sunset") if word in tokens]
pictures = [mean_heat[tokens[word]].sum(axis=0) for word in chosen]
show([[full.images[0], *pictures]], ["the picture", *chosen], [""])
most = ", ".join(f"{picture.max():.2f}" for picture in pictures)
say(f"Each map has a colour scale of its own, from its smallest value to its largest, which is yellow: {most}.")

# %% [markdown]
# ## 4. Reuse one call, and see the damage
#
# The smallest experiment: at one call, every attention takes the map of the call before. All other calls compute their
# own. A **plan** says this as a row with a mark for each call: `.` computes and `#` reuses.
#
# Earlier calls are unchanged, so each run starts from the full run's latents, just before the call whose maps are kept:
# `generate` takes latents and a list of timesteps. Calls are counted from 0. In the left picture up is more damage, so
# its axis runs from high PSNR to low.

# %%
timesteps = pipe.timesteps(STEPS)
row = ReusePlan.stepwise([call == 4 for call in range(STEPS)], maps).grid
say(f"Reuse at call 4 alone is the row `{row}`.")
alone = [1, 2, 4, 6, 10, 13, 16, 18, 19]  # the calls that are tried
damage, growth = [], {}
for call in alone:
    plan = ReusePlan.stepwise([False, True] + [False] * (STEPS - call - 1), maps)  # of calls call - 1, call, ...
    start = steps[call - 2].x if call > 1 else None
    path = []
    result = pipe.generate(
        PROMPTS, seeds=SEEDS, steps=timesteps[call - 1 :], latents=start, plan=plan, on_step=path.append
    )
    damage.append(psnr(result.images, full.images))
    away = [(step.x - true.x).norm() / true.x.norm() for step, true in zip(path, steps[call - 1 :], strict=True)]
    growth[call] = np.array(away[1:])  # from the call that reuses on
damage = np.array(damage)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for picture, (colour, marker) in enumerate(((BLUE, "o"), (ORANGE, "s"))):
    left.plot(alone, damage[:, picture], color=colour, marker=marker, markersize=4, label=f"picture {picture + 1}")
left.plot(alone, damage.mean(axis=1), color="black", ls="--", label="mean")
left.set(xlabel="the one call that reuses its maps", ylabel="PSNR to the full sampler, dB", xticks=range(1, STEPS, 2))
left.invert_yaxis()
left.legend(fontsize=8)
for call, colour, style in ((1, PINK, "-"), (4, BLUE, "--"), (10, GREEN, "-."), (13, ORANGE, ":"), (18, GRAY, "-")):
    right.plot(range(call, STEPS), growth[call] * 100, color=colour, ls=style, lw=2)
    right.plot(call, growth[call][0] * 100, "o", color=colour, markersize=5)
    right.text(call, growth[call][0] * 118, f"call {call}", fontsize=8, ha="center")
right.set(xlabel="call", ylabel="distance of the latents, %", yscale="log", xticks=range(1, STEPS, 2), xlim=(0, 20))
right.yaxis.set_major_formatter("{x:g}")
plt.show()

mean = dict(zip(alone, damage.mean(axis=1), strict=True))  # of the two pictures
worst, best = min(mean, key=mean.get), max(mean, key=mean.get)
say(
    f"As the mean of the two pictures, reuse hurts most at **call {worst}** ({mean[worst]:.1f} dB) and least at **call "
    f"{best}** ({mean[best]:.1f} dB). Pictures differ: picture 1 alone is worst at call "
    f"{alone[damage[:, 0].argmin()]}, picture 2 at call {alone[damage[:, 1].argmin()]}."
)
say(
    f"The mean is {mean[16]:.1f} dB at call 16, {mean[18]:.1f} dB at call 18, and {mean[19]:.1f} dB at call 19, the "
    "last."
)
factor = {call: growth[call][-1] / growth[call][0] for call in alone[:-1]}  # from the call that reuses to the end
steeper = factor[1] / factor[10]
start = growth[1][0] / growth[10][0]
grow = [f"{call} ({value:.1f}-fold)" for call, value in factor.items() if value > 1.5]
stay = [f"{call} ({value:.1f}-fold)" for call, value in factor.items() if value <= 1.5]
say(
    f"Why: an error does not stay what it was (right: each line begins with a dot at the call that reuses). Up to the "
    f"end, the error grows if it is made at call {', '.join(grow)}. It stays about as it is, or shrinks, if it is made "
    f"at call {', '.join(stay)}."
)
say(
    f"Growth is not all. The error of call 1 begins {start:.1f} times as large as that of call 10, and then grows "
    f"{steeper:.1f} times as much. So **{np.log(start) / np.log(start * steeper):.0%}** of the gap between the two, on "
    "the logarithmic scale, is in the size with which they start."
)

# %% [markdown]
# In the paper's figure 3, scores are perturbed instead of reused. The paper counts steps from 1, so its step 19 is our
# call 18. There the damage falls from step 1 to step 18, jumps up at step 19, and is nothing at step 20. Compare the
# left picture at call 18.
#
# Two things make a call dear or cheap: how wrong the old map is there (section 3), and what the calls that remain make
# of the error. The paper proposes that an error grows exponentially over the calls that follow it (its equation 3). The
# cell above tells for which calls it grows here. **HURRY** is the rule that follows from it: if 10 of 20 calls are to
# reuse, take the last 10.
#
# ## 5. HURRY, even, random, PHAST
#
# Here are four plans with 10 reuse calls each. *PHAST* was found by a search on other prompts (section 9), and ships
# with the model. Plans are compared with the full sampler, and so is the plain sampler with 15 instead of 20 steps:
# fewer steps are the rival of every plan.

# %%
searched = {"plans": plans_of(), "sampler": "ddim", "model": pipe.fingerprint, "spacing": pipe.schedule.spacing}
plans = {
    "HURRY": hurry(STEPS, maps, k=10),
    "even": interval(STEPS, maps, k=10),
    "random": random(STEPS, maps, k=10, seed=0),
    "PHAST": phast(STEPS, maps, k=10, **searched),
}
images, caches, held = {}, {}, {}
for name, plan in plans.items():
    cache = caches[name] = ReuseCache()
    held[name] = []
    note = lambda step, cache=cache, name=name: held[name].append(cache.nbytes)  # noqa: E731
    images[name] = pipe.generate(PROMPTS, seeds=SEEDS, steps=STEPS, plan=plan, cache=cache, on_step=note).images
images["15 steps"] = pipe.generate(PROMPTS, seeds=SEEDS, steps=15).images


def far(images):
    """The difference to the full sampler's first picture, times eight. Black is none."""
    return (abs(images[0].astype(int) - full.images[0]) * 8).clip(0, 255)


def draw(rows, colours, labels):
    """Rows of cells, one for each call."""
    _, axis = plt.subplots(figsize=(8, 0.35 * len(rows) + 0.9), layout="constrained")
    for y, row in enumerate(rows.values()):
        for call, mark in enumerate(row):
            axis.add_patch(plt.Rectangle((call + 0.06, y + 0.1), 0.88, 0.8, color=colours[mark]))
            axis.text(call + 0.5, y + 0.5, "" if mark in ".#" else mark, ha="center", va="center", fontsize=8)
    axis.set(xlim=(0, len(row)), ylim=(len(rows), 0), yticks=np.arange(len(rows)) + 0.5, xlabel="call")
    axis.set_yticklabels(rows, family="monospace", fontsize=9)
    axis.set_xticks(np.arange(len(row)) + 0.5, range(len(row)), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colours[mark]) for mark in labels]
    axis.legend(
        patches, labels.values(), ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False
    )
    plt.show()


draw({name: plan.grid for name, plan in plans.items()}, {".": "#DDDDDD", "#": BLUE}, {".": "computes", "#": "reuses"})
scores = {name: psnr(images[name], full.images).mean() for name in images}
order = sorted(scores, key=scores.get)
pictures = [full.images[0], *(images[name][0] for name in order)]
differences = [np.zeros_like(full.images[0]), *(far(images[name]) for name in order)]
titles = ["full sampler", *(f"{name}\nmean {scores[name]:.1f} dB" for name in order)]
show([pictures, differences], titles, ["picture 1", "difference\ntimes eight"])
say(
    "The titles name means over the two pictures, and the first is shown. From worst to best: "
    + ", ".join(f"{name} {scores[name]:.1f} dB" for name in order)
    + "."
)

# %% [markdown]
# Why is HURRY not better, when late errors are small and even plans reuse from call 1 on? Section 4 tried only maps
# that are one call old. HURRY takes its maps at call 9 and holds them for all ten calls that follow, while an even plan
# never uses a map that is more than one call old. The maps of section 3 tell how much older maps are worth:

# %%
assert plans["HURRY"].grid == "." * (STORED + 1) + "#" * (STEPS - STORED - 1)
later = np.arange(STORED + 1, STEPS)
old = np.array([np.mean([aged[site, call] for site in maps]) for call in later])
new = np.array([np.mean([change[site, call] for site in maps]) for call in later])
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(later - STORED, old, "o-", color=BLUE, markersize=4, label=f"held since call {STORED}, as HURRY does")
axis.plot(later - STORED, new, "s-", color=ORANGE, markersize=4, label="held since the call before")
labels = [f"{age}\n({call})" for age, call in zip(later - STORED, later, strict=True)]
axis.set(xlabel="age of HURRY's map, in calls (and the call)", ylabel="distance from\nthe true map", ylim=(0, None))
axis.set_xticks(later - STORED, labels)
axis.legend(fontsize=8)
plt.show()
say(
    f"HURRY's maps are {old[0]:.2f} away from the true ones at call {later[0]}, and **{old[-1]:.2f}** at call "
    f"{later[-1]} (means over all layers). Over these ten calls they are {old.mean() / new.mean():.1f} times as far "
    "away as maps of the call before."
)
say(
    "So there is a third cause: the **age** of a map. A plan has to trade it against the others, and "
    f"HURRY ({scores['HURRY']:.1f} dB) ignores it. The even plan has {scores['even']:.1f} dB here, and random reuse "
    f"{scores['random']:.1f} dB. The oldest map in the plan that PHAST found is "
    f"{max(len(run) for run in plans['PHAST'].grid.split('.'))} calls old."
)

# %% [markdown]
# Two pictures are an anecdote. [What was measured?](measured.md) has such comparisons on more prompts, with intervals.
#
# ## 6. What is stored, for how long, and in how many bytes
#
# The whole plan is known before the first call. So it is known, too, which maps a later call will read, and only those
# are stored. A map is forgotten when it has been read for the last time. Here is the life of the maps under each of the
# four plans:


# %%
def life(plan, site):
    """What happens to a site at each call: `S` it is stored, `R` reused, `L` reused for the last time."""
    marks = ""
    for call in range(plan.calls):
        step = plan.step(call)
        marks += "S" if site in step.store else "L" if site in step.last else "R" if site in step.reuse else "."
    return marks


colours = {".": "#DDDDDD", "#": BLUE, "S": ORANGE, "R": "#56B4E9", "L": "#9AD0F5"}
labels = {".": "computes, keeps nothing", "S": "S computes and stores", "R": "R reuses", "L": "L reuses, then forgets"}
draw({name: life(plan, maps[0]) for name, plan in plans.items()}, colours, labels)

# %% [markdown]
# The cache is a dictionary that the caller owns. The bars show the bytes it holds after each call, for the two pictures
# of section 5. They can be told from the shapes of the maps alone: both halves of the guided batch, all heads,
# places times places or tokens, two bytes for each number. The model computes in float32; the cache keeps float16,
# unless another format is asked for.

# %%
_, axes = plt.subplots(len(held), 1, figsize=(7, 3.2), sharex=True, sharey=True, layout="constrained")
for axis, (name, values) in zip(axes, held.items(), strict=True):
    axis.bar(range(STEPS), np.array(values) / 2**20, width=1, color=ORANGE, edgecolor="white")
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
axes[0].set_title("held after each call for two pictures, MiB", fontsize=9)
axes[0].set_yticks(range(0, 61, 20))
axes[-1].set(xlabel="call", xticks=range(STEPS))
plt.show()

numbers = sum(np.prod(shapes[site]) for site in maps)  # of one picture
for name, cache in caches.items():
    assert cache.peak_nbytes == len(PROMPTS) * numbers * 2
    assert held[name][-1] == 0
largest = max(maps, key=lambda site: np.prod(shapes[site]))
part = sum(np.prod(shapes[site]) for site in maps if shapes[site] == shapes[largest]) / numbers
say(
    f"Each plan's peak is **{len(PROMPTS) * 2 * numbers / 2**20:.1f} MiB** for two pictures, "
    f"**{2 * numbers / 2**20:.1f}** each: 2 bytes times {numbers:,} numbers. The cell asserts it, and that nothing is "
    f"held at the end. The largest maps, {shapes[largest][2]} x {shapes[largest][3]}, hold {part:.0%} of it."
)
twice = sum(np.prod(shapes[site]) * (4 if site.is_cross else 16) for site in maps)
say(
    "Bytes grow steeply with the resolution. At twice the width and height there are four times as many places, so a "
    "cross-attention map is 4 times as large and a self-attention map 16 times. All maps of this model would take "
    f"{2 * twice / 2**20:.0f} MiB a picture, which is {twice / numbers:.1f} times as much."
)

# %% [markdown]
# ## 7. Kernels: does reuse still pay?
#
# A fused kernel computes `softmax(q kᵀ / √d) v` block by block and never writes the map to memory. A call that stores a
# map has to write it after all, and a call that reuses it has to read it. Other tensors can be kept instead:
#
# - an **output** is what an attention layer adds to its input: places times channels, and where it is reused, nothing
#   of the layer runs;
# - a **deep feature** is what enters one layer on the way up: where it is reused, nothing below that layer runs
#   (DeepCache, [arXiv 2312.00858](https://arxiv.org/abs/2312.00858)).
#
# Calls are timed in turn, on one thread and in processor time, so that other programs on the machine disturb little.
# The bars are medians of the ratios, and the thin lines hold the middle half of the ratios.

# %%
kinds = {"maps": maps, "outputs": select(pipe.sites, kind="out"), "deep feature": select(pipe.sites, kind="deep")}


@torch.inference_mode()
def seconds(step, cache):
    start = time.process_time()
    pipe.unet(latent, 500, text, step, cache)
    return time.process_time() - start


threads = torch.get_num_threads()
torch.set_num_threads(1)
stores = {name: ReuseCache() for name in kinds}
works = {"plain, maps written out": (StepPlan(explicit=True), None), "plain, fused kernel": (PLAIN, None)}
for name, sites in kinds.items():
    works[f"stores {name}"] = StepPlan(store=frozenset(sites)), stores[name]
    works[f"reuses {name}"] = StepPlan(reuse=frozenset(sites)), stores[name]
times = {name: [] for name in works}
for turn in range(8):
    for name, work in works.items():
        value = seconds(*work)
        if turn:  # the first turn warms up
            times[name].append(value)
torch.set_num_threads(threads)
beside = np.array(times["plain, fused kernel"])  # ratios within a turn, since machines are not quiet
ratios = {name: np.array(values) / beside for name, values in times.items()}
cost = {name: float(np.median(values)) for name, values in ratios.items()}
fused, explicit = cost["plain, fused kernel"], cost["plain, maps written out"]

figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
colours = [GRAY, GRAY] + [ORANGE, BLUE] * 3
axis.barh(list(cost), list(cost.values()), color=colours)
for y, (name, values) in enumerate(ratios.items()):
    low, high = np.quantile(values, (0.25, 0.75))
    axis.plot((low, high), (y, y), color="black", lw=1)
    axis.text(max(high, cost[name]) + 0.01, y, f"{cost[name]:.2f}", va="center", fontsize=8)
axis.axvline(1, color="black", lw=0.8)
axis.set(xlabel="time of a guided call, as a share of a plain call with the fused kernel")
axis.invert_yaxis()
plt.show()


def run_time(plan, name, plain):
    """A plan's time as a share of the full sampler's: what its calls cost, one by one."""
    storing = max(plain, cost[f"stores {name}"])  # it does all that a plain call does
    total = 0
    for step in map(plan.step, range(plan.calls)):
        reuses, stores = plan.sites[0] in step.reuse, plan.sites[0] in step.store
        total += cost[f"reuses {name}"] if reuses else storing if stores else plain
    return total / (plan.calls * plain)


takes = {name: run_time(hurry(STEPS, sites, k=10), name, fused) for name, sites in kinds.items()}
say(
    "With HURRY's ten reuse calls a run takes this share of the full sampler's time: with maps "
    f"**{run_time(plans['HURRY'], 'maps', explicit):.2f}** where all maps are written out, as in the paper, and "
    f"**{takes['maps']:.2f}** beside a fused kernel; with outputs **{takes['outputs']:.2f}**; with the deep feature "
    f"**{takes['deep feature']:.2f}**."
)
sizes = (f"{name} {cache.nbytes / 2**20:.2f}" for name, cache in stores.items())
say(f"Kept of one picture, in MiB: {', '.join(sizes)}.")
lean = explicit * (1 - mapping)
say(
    f"Writing all maps out makes a plain call take {explicit:.2f} times as long as with the fused kernel. Scores and "
    f"softmax were {mapping:.0%} of it (section 2), so without them a written-out call would cost {lean:.2f}. The "
    f"whole fused call costs 1.00. So where the kernel is fused, about {max(0, 1 - lean):.2f} is left to save in a "
    "call that reuses, and the calls that store take part of it back."
)
low, high = np.quantile(ratios["stores outputs"], (0.25, 0.75))
say(
    "A call that stores does all that a plain call does, and more. Storing outputs comes out at "
    f"{cost['stores outputs']:.2f}, with the middle half of the ratios from {low:.2f} to {high:.2f}: differences of a "
    "few hundredths are noise."
)
say(
    f"Storing maps comes out at {cost['stores maps']:.2f}, and a plain call that writes them out at {explicit:.2f}. "
    "The two write maps differently, so either may come out ahead: the first goes block by block through one small "
    "buffer, the second asks for fresh memory for each map. A plan must not look good by that. So a call that stores "
    "is never counted as cheaper than a plain one, in `run_time` and in the shares above."
)

# %% [markdown]
# ## 8. Extrapolation
#
# A held tensor is one call old, or more. If it moves along a line, the line through its *last two* values tells where
# it is now (order 1; TaylorSeer, [arXiv 2503.06923](https://arxiv.org/abs/2503.06923)). The left picture follows one
# number of one map in the full run: how much the place of the house looks at the word "house". The marks show what an
# even plan would make of this curve. In a run of its own its values would also differ a little from the full run's.

# %%
trace = np.array([kept[CROSS, call][house, tokens["house"]].sum() for call in range(STEPS)])
hold = np.array([trace[call - call % 2] for call in range(STEPS)])
line = hold + np.array([(trace[c - 1] - trace[c - 3]) / 2 if c % 2 and c > 2 else 0 for c in range(STEPS)])

deep = kinds["deep feature"]
even = {"maps": interval(STEPS, maps), "deep feature": interval(STEPS, deep)}
bars = {}
for name, plan in even.items():
    for order, what in enumerate(("held", "on the line")):
        if (name, order) == ("maps", 0):
            got = images["even"]  # section 5 has it
        else:
            got = pipe.generate(PROMPTS, seeds=SEEDS, steps=STEPS, plan=replace(plan, order=order)).images
        bars[f"{name}\n{what}"] = psnr(got, full.images).mean()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained", width_ratios=(3, 2))
left.plot(trace, color=GRAY, label="the full run")
left.plot(range(0, STEPS, 2), trace[::2], "s", color="black", markersize=4, label="the even plan computes")
left.plot(range(1, STEPS, 2), hold[1::2], "o", color=BLUE, label="held")
left.plot(range(1, STEPS, 2), line[1::2], "^", color=ORANGE, label="on the line")
left.set(xlabel="call", ylabel="probability", xticks=range(0, STEPS, 2))
left.legend(fontsize=8)
drawn = right.bar(bars.keys(), bars.values(), color=[BLUE, ORANGE] * 2)
right.bar_label(drawn, fmt="%.1f", fontsize=8)
right.set_ylabel("PSNR to the full sampler, dB")
right.tick_params(axis="x", labelsize=8)
plt.show()

reused = range(3, STEPS, 2)  # calls that have two values before them
far_held = np.array([[change[site, call] for call in reused] for site in maps])
far_line = np.array([[beyond[site, call] for call in reused] for site in maps])
gain = {name: bars[f"{name}\non the line"] - bars[f"{name}\nheld"] for name in even}
say(
    "With every other call reused, going on along the line changes the PSNR by "
    + " and by ".join(f"**{value:+.1f} dB** with {name}" for name, value in gain.items())
    + "."
)
rest = far_line < np.quantile(far_line, 0.9)
nearer = (abs(line - trace) < abs(hold - trace))[list(reused)]
say(
    f"The one number on the left is smooth, and the line is nearer than the held value at {nearer.sum()} of "
    f"{len(reused)} calls. Not every number is. As a mean over layers and calls, a held map is {far_held.mean():.2f} "
    f"away from the true one and the line {far_line.mean():.2f}, and yet, of all {far_line.size} maps (a layer and a "
    f"call each), the line is nearer to {(far_line < far_held).mean():.0%}. Without the tenth that the line misses "
    f"most, the means are {far_held[rest].mean():.2f} and {far_line[rest].mean():.2f}."
)
drift = [
    np.mean([float(added_up[site][order].abs().sum()) / np.prod(shapes[site][1:3]) / len(reused) for site in maps])
    for order in (0, 1)
]
say(
    "We do not know why the picture does not simply follow the mean of the maps. Two causes are possible. The few maps "
    "that the line misses most may matter little for the picture. And errors that point the same way at each call add "
    "up, while errors that change their direction cancel: averaged over these calls with their signs, held maps are "
    f"{drift[0]:.3f} off, which is {drift[0] / far_held.mean():.0%} of their distance, and the line {drift[1]:.3f}, "
    f"which is {drift[1] / far_line.mean():.0%} of its own."
)

# %% [markdown]
# The distance of a tensor is not yet the distance of a picture, so plans are judged by pictures. Order 1 keeps two
# values of each tensor.
#
# ## 9. Search
#
# PHAST begins at HURRY. It tries every plan that differs by one exchange of a reuse call with a computing one, keeps
# the best, and goes on from there until nothing improves. The score is the PSNR to the full sampler. Here it runs live,
# with 8 calls, 3 of them reused, on one prompt. `Renderer` keeps what plans share: two plans that begin alike compute
# their beginning once.

# %%
SHORT = 8  # calls
render = Renderer(pipe, PROMPTS[:1], SEEDS[:1], steps=SHORT)
reference = render(ReusePlan.nothing(SHORT))
tried = {}  # a plan's row: its score, in the order in which plans are tried first
found = search(
    render,
    hurry(SHORT, maps, k=3),
    maps,
    k=3,
    score=lambda images: float(psnr(images, reference)[0]),
    on_try=lambda plan, score, whole: tried.setdefault(plan.grid, score),
)
assert len(tried) == len(found.tried)
rows, values = list(tried), list(tried.values())
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.plot(values, "o", color=GRAY, markersize=4, label="a plan")
axis.plot(np.maximum.accumulate(values), color=BLUE, drawstyle="steps-post", label="the best so far")
axis.set(xlabel="different plans, in the order in which they are tried", ylabel="PSNR, dB")
axis.xaxis.get_major_locator().set_params(integer=True)
axis.legend(fontsize=8)
plt.show()
say(
    f"HURRY is `{rows[0]}` with {found.start_score:.1f} dB. After {found.rounds} rounds and {len(tried)} different "
    f"plans the search ends at `{found.plan.grid}` with **{found.score:.1f} dB**. It made {render.calls} U-Net calls "
    f"instead of {render.naive_calls}."
)

unseen = {"seeds": SEEDS[1], "steps": SHORT}
truth = pipe.generate(PROMPTS[1], **unseen).images
both = (hurry(SHORT, maps, k=3), found.plan)
there = [psnr(pipe.generate(PROMPTS[1], plan=plan, **unseen).images, truth)[0] for plan in both]
say(f"On the other prompt, which the search has not seen, HURRY has {there[0]:.1f} dB and this plan {there[1]:.1f} dB.")

# %% [markdown]
# A search looks at few prompts, so what counts is what its plan does on others. `python -m minireuse.search` searches
# over several and reports unseen ones.
#
# ## 10. Is reuse worth it?
#
# Now both halves of the question of the beginning stand side by side: how close a run comes, and how long it takes. A
# run with reuse is worth its trouble where it is closer than the plain sampler of about the same time. So each is
# compared with the plain run whose time is nearest. Two runs that are less than 0.5 dB apart count as level, and
# savings of less than 5 % are not judged, because times waver. Times come from section 7, where outputs and deep
# features were timed beside the fused kernel alone; an extrapolated tensor is counted as if it were held.

# %%
shorter = {12: None, 15: images["15 steps"], 17: None, 18: None}  # steps: pictures of the plain sampler
for count, got in shorter.items():
    got = pipe.generate(PROMPTS, seeds=SEEDS, steps=count).images if got is None else got
    shorter[count] = psnr(got, full.images).mean()


def verdict(close, took):
    """What a run is worth beside the plain sampler."""
    if took > 0.95:
        return "saves less than 5 %"
    rival = min(shorter, key=lambda count: abs(count / STEPS - took))
    ahead = close - shorter[rival]
    return f"{'closer than' if ahead > 0.5 else 'farther than' if ahead < -0.5 else 'level with'} {rival} steps"


runs = {f"maps, {name}": (plan, "maps", scores[name]) for name, plan in plans.items()}
runs["maps, even, on the line"] = even["maps"], "maps", bars["maps\non the line"]
outputs = interval(STEPS, kinds["outputs"])
got = pipe.generate(PROMPTS, seeds=SEEDS, steps=STEPS, plan=outputs).images
runs["outputs, even"] = outputs, "outputs", psnr(got, full.images).mean()
for what in ("held", "on the line"):
    runs[f"deep feature, even, {what}"] = even["deep feature"], "deep feature", bars["deep feature\n" + what]

table = [
    "| run | PSNR, dB | time, fused kernel | verdict | time, maps written out | verdict |",
    "|---|---|---|---|---|---|",
]
fused_times, words_of = {}, {}
for name, (plan, kind, close) in runs.items():
    cells = []
    for plain in (fused, explicit)[: 2 if kind == "maps" else 1]:
        took = run_time(plan, kind, plain)
        words_of[name, plain] = verdict(close, took)
        cells += [f"{took:.2f}", words_of[name, plain]]
        fused_times.setdefault(name, took)
    table.append(f"| {name} | {close:.1f} | {' | '.join(cells)} |" + " | |" * (kind != "maps"))
for count, close in shorter.items():
    table.append(f"| nothing, {count} steps | {close:.1f} | {count / STEPS:.2f} | | {count / STEPS:.2f} | |")
say("\n".join(table))


def those(plain, start):
    """The runs of which a verdict begins so."""
    return ", ".join(f"*{name}*" for (name, at), text in words_of.items() if at == plain and text.startswith(start))


map_times = [took for name, took in fused_times.items() if name.startswith("maps")]
answers = [
    f"**The answer.** Beside a fused kernel {sum(took <= 0.95 for took in map_times)} of the {len(map_times)} map "
    f"plans save more than 5 % of the full sampler's time, and the fastest takes {min(map_times):.2f} of it. Of all "
    "runs that save more than 5 %, these are closer than the plain sampler of about the same time: "
    f"{those(fused, 'closer') or 'none'}. Level with it: {those(fused, 'level') or 'none'}. Farther: "
    f"{those(fused, 'farther') or 'none'}.",
    "Where all maps are written out, as in the paper, closer than the plain sampler of about the same time: "
    f"{those(explicit, 'closer') or 'none'}. Level with it: {those(explicit, 'level') or 'none'}. Farther: "
    f"{those(explicit, 'farther') or 'none'}. Save less than 5 %: {those(explicit, 'saves') or 'none'}.",
]
for answer in answers:
    say(answer)

# %% [markdown]
# Two pictures decide here, so a difference of a dB or two may turn on others.
#
# ## 11. Write your own plan
#
# Edit the row and run the cell again. Call 0 has to compute. Ten calls that reuse make it comparable with the even
# plan. What have sections 4 and 5 told about early calls, call 18, and old maps?

# %%
ROW = "....#.#.#.##.##.##.#"
mine = ReusePlan.stepwise([mark == "#" for mark in ROW], maps)
got = pipe.generate(PROMPTS[0], seeds=SEEDS[0], steps=STEPS, plan=mine).images
rivals = {name: psnr(images[name], full.images)[0] for name in plans}  # of picture 1
own_score = psnr(got, full.images[:1])[0]
beaten = [name for name, score in rivals.items() if own_score > score]
say(
    f"`{ROW}` reuses in {ROW.count('#')} calls and has **{own_score:.1f} dB** on picture 1. It is closer than "
    f"{', '.join(beaten) or 'none'}, of " + ", ".join(f"{name} {score:.1f}" for name, score in rivals.items()) + "."
)

# %% [markdown]
# ## 12. Exercises
#
# Think first, then read the cell below each question.
#
# **1.** Can the first call reuse?

# %%
try:
    ReusePlan.stepwise([True] + [False] * 9, maps)
except PlanError as error:
    say(f"No: *{error}*")

# %% [markdown]
# **2.** A plan of ten calls reuses at calls 3, 4 and 7. Which calls store, and which read for the last time?

# %%
plan = ReusePlan.stepwise([call in (3, 4, 7) for call in range(10)], maps)
say(f"`{plan.grid}` becomes `{life(plan, maps[0])}`: calls 2 and 6 store, calls 4 and 7 read for the last time.")
assert life(plan, maps[0]) == "..SRL.SL.."

# %% [markdown]
# **3.** How many bytes does the cache need without guidance, and with extrapolation?

# %%
short = interval(6, maps, k=2)
peaks = {}
for name, scale, order in (("as it is", 7.5, 0), ("without guidance", 1, 0), ("extrapolated", 7.5, 1)):
    settings = {"steps": 6, "seeds": 0, "guidance_scale": scale}
    peaks[name] = pipe.generate(PROMPTS[0], plan=replace(short, order=order), **settings).cache_peak_bytes
assert peaks["without guidance"] * 2 == peaks["as it is"]
assert peaks["extrapolated"] == peaks["as it is"] * 2
say("Half, since there is no unconditional half; and twice, since two values make a line. Peaks, in MiB: ")
say(", ".join(f"{name} {peak / 2**20:.1f}" for name, peak in peaks.items()))

# %% [markdown]
# **4.** The guided prediction of the whole U-Net can be held, too: such a call runs no network at all. Hold it at every
# other call of DDIM. Which sampler is this?

# %%
ten = pipe.generate(PROMPTS[0], steps=timesteps[::2]).latents
held_eps = pipe.generate(PROMPTS[0], steps=timesteps, plan=interval(STEPS, [PREDICTION], k=10)).latents
apart = float((held_eps - ten).norm() / ten.norm())
assert apart < 1e-3
say(
    f"DDIM with every other timestep: two DDIM steps along one prediction are one longer step (difference {apart:.0e})."
)

# %% [markdown]
# **5.** Section 3 shows which maps change less from call to call, those of self-attention or those of cross-attention.
# Do these also do less damage where they are reused?

# %%
alike, closer = {}, {}
for which in ("self", "cross"):
    sites = select(pipe.sites, which)
    alike[which] = np.mean([change[site, call] for site in sites for call in calls])
    got = pipe.generate(PROMPTS[0], seeds=SEEDS[0], steps=SHORT, plan=hurry(SHORT, sites, k=SHORT // 2)).images
    closer[which] = psnr(got, reference)[0]
    share_of = sum(np.prod(shapes[site]) for site in sites) / numbers
    say(
        f"HURRY over {which}-attention alone, with {SHORT} calls: {closer[which]:.1f} dB, with {share_of:.0%} of the "
        f"bytes. These maps change by {alike[which]:.2f} a call."
    )
calm, lively = sorted(alike, key=alike.get)
if closer[calm] < closer[lively]:
    say(
        f"No, and this is the trap: {calm}-attention maps change less and yet do more damage. How far a map is off "
        "does not say what the picture makes of it. That also depends on the values that the map is multiplied by, and "
        "perhaps on guidance, which enlarges what differs between the halves with and without the prompt."
    )
else:
    say(f"Here they do: {calm}-attention maps change less and do less damage. It need not be so on other pictures.")
say("This is one picture, and so an anecdote.")

# %% [markdown]
# ## What you have seen

# %%
say(
    f"""
- **Maps of neighbouring calls are alike.** Their mean change a call is {min(by_call):.2f} to {max(by_call):.2f}, on a
  scale from 0 to 2 ({alike["cross"]:.2f} in cross-attention, {alike["self"]:.2f} in self-attention).
- **What reuse does to the picture depends on three things:** how much the maps change at that call, how old the held
  map is, and what the calls that remain make of the error. Reuse at one call alone leaves {mean[worst]:.1f} dB (call
  {worst}) to {mean[best]:.1f} dB (call {best}).
- **HURRY** weighs the last of the three alone. With ten of {STEPS} calls that reuse, the plans have """
    + ", ".join(f"{scores[name]:.1f} dB ({name})" for name in sorted(plans, key=scores.get))
    + f""".
- **A search** ended at {found.score:.1f} dB where HURRY had {found.start_score:.1f}, with {SHORT} calls, and at
  {there[1]:.1f} where HURRY had {there[0]:.1f} on a prompt that it had not seen.
- **Bytes.** Maps take {stores["maps"].nbytes / 2**20:.1f} MiB a picture in float16, outputs
  {stores["outputs"].nbytes / 2**20:.1f}, and the deep feature {stores["deep feature"].nbytes / 2**20:.2f}.
- **Time.** Making maps is {mapping:.0%} of a call that writes them out. Beside a fused kernel a call costs
  {cost["reuses maps"]:.2f} where it reuses maps, {cost["reuses outputs"]:.2f} with outputs, and
  {cost["reuses deep feature"]:.2f} with the deep feature.
- {answers[0]}
- {answers[1]}
"""
)

# %% [markdown]
# What this leaves open: these are two pictures of one small model with one sampler, on a CPU. [What was
# measured?](measured.md) has more prompts, samplers and models, with intervals.

# %%
say(
    f"This notebook took {time.process_time() / 60:.1f} minutes of processor time (threads: {torch.get_num_threads()})."
)

# %% [markdown]
# ## Where to go from here
#
# - [A page to play with](explorer.html): open it in a browser, choose which calls reuse, and see the picture.
# - [The method in a hundred lines](reuse_in_100_lines.py): the same without the package's mechanism, to read.
# - [How it works, in diagrams](how-it-works.md): the branches of a call, and the life of a cache entry.
# - `plan.py`, `cache.py` and `attention.py` in `minireuse/`, in this order: what you have seen here, in code.
# - [Which policy should I choose?](choosing-a-policy.md) and [How do I search a plan?](searching.md)
