"""The project's functions in the layouts and names of the golden checks: NCHW outside, NHWC inside.

Nothing is computed here. Used by tests/test_golden.py and by the external checker of the
official numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.diffusion import augment as augmentation
from relay_jax.diffusion import blur as blur_module
from relay_jax.diffusion import dct as dct_module
from relay_jax.diffusion import grid, multistep, sampler
from relay_jax.diffusion import loss as loss_module
from relay_jax.diffusion.block_noise import block_noise as our_block_noise
from relay_jax.diffusion.guidance import Guidance, classifier_free
from relay_jax.diffusion.precondition import precondition
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.evaluation import metrics, neighbours
from relay_jax.models.unet import UNet
from relay_jax.official.files import read_official
from relay_jax.official.parameters import from_official, to_official
from relay_jax.sampling import pixels


def nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, -3)


# Transforms


def dct(x, patch):
    return nchw(dct_module.patch_dct(nhwc(x), patch))


def idct(x, patch):
    return nchw(dct_module.patch_idct(nhwc(x), patch))


def blur(x, blur_sigma, patch):
    return nchw(blur_module.blur(nhwc(x), blur_sigma, patch))


def attenuation(sigma, patch, cdf_max, blur_sigma_max):
    process = RelayProcess(patch=patch, cdf_max=cdf_max, blur_sigma_max=blur_sigma_max)
    return blur_module.attenuation(process.blur_sigma(process.u_from_sigma(sigma)), patch)


def block_noise(gaussian, size):
    return nchw(our_block_noise(nhwc(gaussian), size))


# Losses


def _as_dict(corrupted):
    images = ("noisy", "blurred")
    return {k: nchw(v) if k in images else v for k, v in corrupted._asdict().items()}


def relay_corrupt(images, uniform, gaussian, block_gaussian, **settings):
    draws = loss_module.Draws(jnp.asarray(uniform), nhwc(gaussian), nhwc(block_gaussian))
    return _as_dict(loss_module.corrupt(RelayProcess(**settings), nhwc(images), draws))


def relay_loss(denoiser, images, uniform, gaussian, block_gaussian, **settings):
    process = RelayProcess(**settings)
    draws = loss_module.Draws(jnp.asarray(uniform), nhwc(gaussian), nhwc(block_gaussian))
    corrupted = loss_module.corrupt(process, nhwc(images), draws)
    return nchw(loss_module.loss_map(denoiser(jnp), nhwc(images), corrupted))


def edm_corrupt(images, normal, gaussian):
    draws = loss_module.Draws(jnp.asarray(normal), nhwc(gaussian), None)
    return _as_dict(loss_module.corrupt(EdmProcess(), nhwc(images), draws))


def edm_loss(denoiser, images, normal, gaussian):
    draws = loss_module.Draws(jnp.asarray(normal), nhwc(gaussian), None)
    corrupted = loss_module.corrupt(EdmProcess(), nhwc(images), draws)
    return nchw(loss_module.loss_map(denoiser(jnp), nhwc(images), corrupted))


# Schedules


def edm_sigmas(**settings):
    return grid.edm_sigmas(**settings)


def relay_sigmas(**settings):
    return grid.relay_sigmas(**settings)


# Samplers


def _replay(noise):
    """A noise_fn that reads recorded fields; the starting noise has no axis of steps."""
    table = {k: nhwc(v) for k, v in noise.items()}

    def noise_fn(step, purpose):
        name = purpose.name.lower()
        return table[name] if name.startswith("initial") else table[name][step]

    return noise_fn


def _result(samples):
    return {"final": nchw(samples.final), "states": nchw(samples.states)}


def sample_edm(denoiser, latents, labels, noise, guidance, sde_scale=0.0, **settings):
    guided = classifier_free(denoiser(jnp), jnp.asarray(labels), Guidance(weight=guidance))
    heun, process = sampler.Heun(fresh_noise=sde_scale, **settings), EdmProcess()

    @jax.jit
    def run(x, noise):
        start = process.initial_state(heun.levels()[0], lambda step, purpose: x)
        return heun(guided, start, process, _replay(noise), True)

    return _result(run(nhwc(latents), noise))


def sample_relay(
    denoiser,
    low_res,
    labels,
    noise,
    patch,
    cdf_max,
    blur_sigma_max,
    block_noise_scale,
    guidance,
    s_churn,
    s_min,
    s_max,
    s_noise,
    **settings,
):
    if s_churn > 0:
        raise NotImplementedError("a stage that continues images has no churn")
    process = RelayProcess(
        patch=patch,
        cdf_max=cdf_max,
        blur_sigma_max=blur_sigma_max,
        block_noise_scale=block_noise_scale,
    )
    guided = classifier_free(denoiser(jnp), jnp.asarray(labels), Guidance(weight=guidance))
    heun = sampler.Heun(**settings)

    @jax.jit
    def run(x, noise):
        noise_fn = _replay(noise)
        start = process.initial_state(heun.levels()[0], noise_fn, x)
        return heun(guided, start, process, noise_fn, True)

    return _result(run(nhwc(low_res), noise))


# Few steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnLevels(multistep.Multistep):
    """On levels of the caller's own."""

    num_steps: int = 1
    sigmas: tuple = (1.0,)

    def levels(self):
        return np.append(self.sigmas, 0.0)


def _few_steps(denoiser, start, noise, sigmas, process, **settings):
    solver = _OnLevels(sigmas=tuple(np.asarray(sigmas, float)), **settings)
    run = jax.jit(lambda x, noise: solver(denoiser(jnp), x, process, _replay(noise)).final)
    return nchw(run(nhwc(start), noise))


def edm_multistep(denoiser, start, noise, sigmas, fresh_noise_rate, corrector):
    settings = {"fresh_noise_rate": fresh_noise_rate, "corrector": corrector}
    return _few_steps(denoiser, start, noise, sigmas, EdmProcess(), **settings)


def relay_multistep(
    denoiser,
    start,
    noise,
    sigmas,
    fresh_noise_rate,
    corrector,
    exact_first_blur,
    **process,
):
    settings = {
        "fresh_noise_rate": fresh_noise_rate,
        "corrector": corrector,
        "exact_first_blur": exact_first_blur,
    }
    return _few_steps(denoiser, start, noise, sigmas, RelayProcess(**process), **settings)


def noise_handoff(low_state, gauss, block, sigma, patch, block_noise_scale):
    process = RelayProcess(patch=patch, block_noise_scale=block_noise_scale)
    noise_fn = _replay({"initial_gauss": gauss, "initial_block": block})
    return nchw(process.initial_state_from_noise(sigma, noise_fn, nhwc(low_state)))


fresh_noise_rate = multistep.rate_of_share


# Network


def _network(config):
    return UNet(
        resolution=config["img_resolution"],
        channels=config["model_channels"],
        multipliers=tuple(config["channel_mult"]),
        blocks=config["num_blocks"],
        attention=tuple(config["attn_resolutions"]),
        num_classes=config["label_dim"],
        num_augment=config["augment_dim"],
        image_channels=config["img_channels"],
        embedding_multiplier=config["channel_mult_emb"],
    )


def unet(params, config, x, sigma, class_labels, augment_labels):
    net, flax_params = _network(config), from_official(params)
    raw = {}

    @jax.jit
    def run(p, x, sigma):
        def network(*inputs):
            raw["F_x"] = net.apply({"params": p}, *inputs)
            return raw["F_x"]

        return precondition(network)(x, sigma, class_labels, augment_labels), raw["F_x"]

    d_x, f_x = run(flax_params, nhwc(x), sigma)
    return {"D_x": nchw(d_x), "F_x": nchw(f_x)}


def unet_grad(params, config, x, sigma, class_labels, augment_labels, cotangent, names):
    net = _network(config)

    @jax.jit
    def gradient(p, x):
        def scalar(p, x):
            denoise = precondition(lambda *inputs: net.apply({"params": p}, *inputs))
            return jnp.sum(denoise(x, sigma, class_labels, augment_labels) * nhwc(cotangent))

        return jax.grad(scalar, argnums=(0, 1))(p, x)

    grads, grad_x = gradient(from_official(params), nhwc(x))
    official = to_official(grads)
    return {"x": nchw(grad_x), **{name: official[name] for name in names}}


# Checkpoints


def read_checkpoint(path):
    return read_official(path, ("ema",)).ema.params


def read_training_state(path):
    state = read_official(path, optimizer=True)
    return {
        "images_seen": state.images_seen,
        "ema": state.ema.params,
        "net": state.net.params,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
    }


# Metrics

feature_stats, fid = metrics.feature_stats, metrics.fid
precision_recall, inception_score = neighbours.precision_recall, metrics.inception_score


# Augmentation


def augment(images, draws, p, **settings):
    images, labels = augmentation.apply_draws(
        nhwc(images),
        augmentation.Draws(**draws),
        augmentation.Augmentation(probability=p, **settings),
    )
    return nchw(images), labels


# Pixels


def to_uint8(images, edit):
    return pixels.edit_pixels(pixels.to_uint8(np.moveaxis(images, 1, -1)), edit)
