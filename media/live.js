"use strict";
// talkingflow.py's sampler in plain JavaScript: the same names in the same order, one frame at a time, for B
// faces that hear one voice. An array (B, C) holds the faces' rows one after the other. Weights come as
// float16, everything is computed in float64.

// -----------------------------------------------------------------------------------------------------------
// Rows of matrices

/** Sum of w[i + n] x[j + n] over n < length. */
function dot(w, i, x, j, length) {
  let sum = 0;
  for (let n = 0; n < length; n++) sum += w[i + n] * x[j + n];
  return sum;
}

/** y[o] += w[i..] . x[j..], y[p] += w[k..] . x[j..]: two rows for one reading of x, in four sums that do not
 *  wait for each other. Nearly all of a frame's time is spent here. */
function dot2(w, i, k, x, j, length, y, o, p) {
  let a = 0, b = 0, c = 0, d = 0, n = 0;
  for (; n + 3 < length; n += 4) {
    const x0 = x[j + n], x1 = x[j + n + 1], x2 = x[j + n + 2], x3 = x[j + n + 3];
    a += w[i + n] * x0 + w[i + n + 2] * x2, b += w[i + n + 1] * x1 + w[i + n + 3] * x3;
    c += w[k + n] * x0 + w[k + n + 2] * x2, d += w[k + n + 1] * x1 + w[k + n + 3] * x3;
  }
  for (; n < length; n++) a += w[i + n] * x[j + n], c += w[k + n] * x[j + n];
  y[o] += a + b, y[p] += c + d;
}

/** y[j + n] += f w[i + n] for n < length. */
function add(w, i, f, y, j, length) {
  for (let n = 0; n < length; n++) y[j + n] += f * w[i + n];
}

/** y[j..] += f w[i..] + g w[k..]: the same with the matrix transposed. */
function add2(w, i, k, f, g, y, j, length) {
  for (let n = 0; n < length; n++) y[j + n] += f * w[i + n] + g * w[k + n];
}

/** x (B, I), weight (O, I), bias (O,) or null -> x weight^T + bias (B, O). */
function linear(x, weight, bias, I) {
  const B = x.length / I, O = weight.length / I, y = new Float64Array(B * O);
  if (bias) for (let b = 0; b < B; b++) y.set(bias, b * O);
  for (let o = 0; o + 1 < O; o += 2)  // rows stay in the cache for all faces
    for (let b = 0; b < B; b++) dot2(weight, o * I, (o + 1) * I, x, b * I, I, y, b * O + o, b * O + o + 1);
  if (O % 2) for (let b = 0; b < B; b++) y[b * O + O - 1] += dot(weight, (O - 1) * I, x, b * I, I);
  return y;
}

/** (B, n) and (B, m) side by side: (B, n + m). */
function cat(x, y, B) {
  const n = x.length / B, m = y.length / B, both = new Float64Array(B * (n + m));
  for (let b = 0; b < B; b++) {
    both.set(x.subarray(b * n, (b + 1) * n), b * (n + m));
    both.set(y.subarray(b * m, (b + 1) * m), b * (n + m) + n);
  }
  return both;
}

/** Columns from..to-1 of x (B, n). */
function columns(x, n, from, to) {
  const B = x.length / n, part = new Float64Array(B * (to - from));
  for (let b = 0; b < B; b++) part.set(x.subarray(b * n + from, b * n + to), b * (to - from));
  return part;
}

/** The weights of a page, name -> its numbers with their `shape`; undefined for a name that is not there. */
function unpack({tensors, weights}) {
  const half = new Uint16Array(Uint8Array.from(atob(weights), ch => ch.charCodeAt(0)).buffer);
  const numbers = Float32Array.from(half, h => {
    const exponent = (h >> 10) & 31, fraction = h & 1023, sign = h >> 15 ? -1 : 1;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
  const table = new Map(), size = shape => shape.reduce((a, b) => a * b, 1);
  for (const [name, shape, first] of tensors)
    table.set(name, Object.assign(numbers.subarray(first, first + size(shape)), {shape}));
  return name => table.get(name);
}

// -----------------------------------------------------------------------------------------------------------
// The sound: a causal log-mel spectrogram, one column a video frame

/** In place, the Fourier transform of re + i im, whose length is a power of 2. */
function fft(re, im) {
  const N = re.length;
  for (let i = 1, j = 0; i < N; i++) {  // the order of reversed bits
    let bit = N >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let half = 1; half < N; half *= 2)
    for (let n = 0; n < half; n++) {
      const c = Math.cos(Math.PI * n / half), s = -Math.sin(Math.PI * n / half);
      for (let i = n; i < N; i += 2 * half) {
        const j = i + half, x = c * re[j] - s * im[j], y = s * re[j] + c * im[j];
        re[j] = re[i] - x, im[j] = im[i] - y;
        re[i] += x, im[i] += y;
      }
    }
}

/** |DFT|^2 of the first K bins of N samples, any N: 2nk = n^2 + k^2 - (k-n)^2 makes it a convolution
 *  (Bluestein). */
class Spectrum {
  constructor(N, K) {
    const L = 2 ** Math.ceil(Math.log2(N + K - 1)), turn = n => Math.PI * (n * n % (2 * N)) / N;
    Object.assign(this, {N, K, re: new Float64Array(L), im: new Float64Array(L)});
    this.cos = Float64Array.from({length: N}, (_, n) => Math.cos(turn(n)));
    this.sin = Float64Array.from({length: N}, (_, n) => Math.sin(turn(n)));
    this.kernelRe = new Float64Array(L), this.kernelIm = new Float64Array(L);
    for (let n = 1 - N; n < K; n++) {
      this.kernelRe[(n + L) % L] = Math.cos(turn(n)) / L;
      this.kernelIm[(n + L) % L] = Math.sin(turn(n)) / L;
    }
    fft(this.kernelRe, this.kernelIm);
  }

  power(samples) {
    const {N, K, re, im, kernelRe, kernelIm} = this;
    re.fill(0), im.fill(0);
    for (let n = 0; n < N; n++) re[n] = samples[n] * this.cos[n], im[n] = -samples[n] * this.sin[n];
    fft(re, im);
    for (let n = 0; n < re.length; n++) {
      const x = re[n] * kernelRe[n] - im[n] * kernelIm[n], y = re[n] * kernelIm[n] + im[n] * kernelRe[n];
      re[n] = y, im[n] = x;  // real and imaginary parts exchanged make the second transform the inverse one
    }
    fft(re, im);
    return Float64Array.from({length: K}, (_, k) => re[k] ** 2 + im[k] ** 2);  // the last chirp has modulus 1
  }
}

/** Slaney's mel scale, as librosa has it: linear below 1 kHz, logarithmic above. */
const toMel = f => f < 1000 ? f * 3 / 200 : 15 + 27 * Math.log(f / 1000) / Math.log(6.4);
const fromMel = m => m < 15 ? m * 200 / 3 : 1000 * Math.exp((m - 15) * Math.log(6.4) / 27);

const FLOOR = 1e-13, QUIET = -21;

/** Log-mel columns, see media/sound.py. Column t sees the samples before (t + 1) / fps seconds. */
class Mel {
  constructor({n_mels, fmin, fmax, window, level}, fps, sampleRate) {
    const size = Math.round(window * sampleRate);
    Object.assign(this, {M: n_mels, fps, sampleRate, level, size, count: 0, frame: 0});
    const hz = k => k * sampleRate / size;
    this.hann = Float32Array.from({length: size}, (_, n) => 0.5 - 0.5 * Math.cos(2 * Math.PI * n / size));
    const sum = this.hann.reduce((a, b) => a + b), bins = Math.floor(size / 2) + 1;
    const K = Math.min(bins, Math.ceil(fmax * size / sampleRate) + 1);  // nothing above fmax is asked for
    const edge = i => fromMel(toMel(fmin) + (toMel(fmax) - toMel(fmin)) * i / (n_mels + 1));
    this.bank = new Float32Array(n_mels * K);  // triangles of unit area
    for (let m = 0; m < n_mels; m++)
      for (let k = 0, [low, top, high] = [edge(m), edge(m + 1), edge(m + 2)]; k < K; k++) {
        const height = Math.max(0, Math.min((hz(k) - low) / (top - low), (high - hz(k)) / (high - top)));
        this.bank[m * K + k] = height * 2 / (high - low) / sum ** 2;
      }
    this.spectrum = new Spectrum(size, K);
    this.loudest = QUIET;  // the loudest so far, forgotten at `level` nats a column
    this.past = new Float32Array(size + 2);  // a ring: sample n at n % length
  }

  /** The next samples -> the columns they complete. */
  push(samples) {
    const done = [];
    for (const sample of samples) {
      this.past[this.count++ % this.past.length] = sample;
      if (this.count * this.fps / this.sampleRate + 1e-9 >= this.frame + 1) done.push(this.column());
    }
    return done;
  }

  column() {
    const {past, hann, size, bank, M} = this, length = past.length;
    const end = Math.floor(++this.frame * this.sampleRate / this.fps);
    const windowed = hann.map((h, n) => h * past[(end - size + n + length) % length]);
    const spectrum = this.spectrum.power(windowed), K = spectrum.length;
    const power = Float64Array.from({length: M}, (_, m) => Math.max(dot(bank, m * K, spectrum, 0, K), FLOOR));
    if (!this.level) return power.map(Math.log);
    this.loudest = Math.max(this.loudest - this.level, Math.log(power.reduce((a, b) => a + b)), QUIET);
    return power.map(v => Math.log(v) - this.loudest);
  }
}

// -----------------------------------------------------------------------------------------------------------
// ConditionTCN

/** tanh(a[:H]) sigmoid(a[H:]), a = causal dilated convolution of x + bias + cond. `past` is a ring. */
class GatedCausalConv {
  constructor(w, name, dilation, B) {
    this.weight = w(`${name}.weight`), this.bias = w(`${name}.bias`);  // (2H, k, C), (2H,)
    const [H2, k, C] = this.weight.shape, rows = (k - 1) * dilation + 1;
    Object.assign(this, {H: H2 / 2, k, C, dilation, B, rows, frame: 0, past: new Float64Array(rows * B * C)});
  }

  forward(x, cond) {  // x (B, C), cond (2H,) the same for all faces -> (B, H)
    const {weight, bias, H, k, C, B, past, rows} = this, H2 = 2 * H, a = new Float64Array(B * H2);
    past.set(x, this.frame % rows * B * C);
    for (let i = 0; i < a.length; i++) a[i] = bias[i % H2] + cond[i % H2];
    for (let j = 0; j < k; j++) {
      const row = (this.frame + rows - (k - 1 - j) * this.dilation) % rows * B * C;  // of tap j's input
      for (let o = 0; o < H; o++)
        for (let b = 0, i = o; b < B; b++, i += H2)
          dot2(weight, (o * k + j) * C, ((H + o) * k + j) * C, past, row + b * C, C, a, i, i + H);
    }
    this.frame++;
    this.tanh = columns(a, H2, 0, H).map(Math.tanh);
    this.sigmoid = columns(a, H2, H, H2).map(v => 1 / (1 + Math.exp(-v)));
    return this.tanh.map((v, i) => v * this.sigmoid[i]);
  }

  backward(g) {  // d/dx (B, C) of sum g y, for this frame's x alone: the past is given
    const {weight, H, k, C, B, tanh, sigmoid} = this, dx = new Float64Array(B * C);
    for (let o = 0; o < H; o++)
      for (let b = 0, i = o; b < B; b++, i += H) {
        const da = g[i] * sigmoid[i] * (1 - tanh[i] ** 2);
        const db = g[i] * tanh[i] * sigmoid[i] * (1 - sigmoid[i]);
        add2(weight, (o * k + k - 1) * C, ((H + o) * k + k - 1) * C, da, db, dx, b * C, C);
      }
    return dx;
  }
}

class ConditionTCN {
  constructor(w, name, config, B) {
    this.layers = config.dilations.map((d, i) => new GatedCausalConv(w, `${name}.layers.${i}`, d, B));
    this.H = this.layers[0].H, this.cond = w(`${name}.cond.weight`);
    this.weight = w(`${name}.out.weight`), this.bias = w(`${name}.out.bias`);
  }

  forward(x, c) {  // x (B, C), c (M,) -> (B, out)
    const conds = linear(c, this.cond, null, c.length), H2 = 2 * this.H;
    this.layers.forEach((layer, i) => { x = layer.forward(x, conds.subarray(i * H2, (i + 1) * H2)); });
    return linear(x, this.weight, this.bias, this.H);
  }

  backward(g) {
    const {weight, H} = this, O = weight.length / H, n = O / 2, B = g.length / O;
    const dh = new Float64Array(B * H);
    for (let o = 0; o < n; o++)  // s and t of one coordinate
      for (let b = 0, i = o; b < B; b++, i += O)
        add2(weight, o * H, (n + o) * H, g[i], g[i + n], dh, b * H, H);
    return this.layers.reduceRight((d, layer) => layer.backward(d), dh);
  }
}

// -----------------------------------------------------------------------------------------------------------
// One step of the flow. Each layer has its inverse, noise -> data, and `backward`, which takes d log p / dy
// to d log p / dx, the layer's log-determinant included, in the frame that `inverse` went last.

class ActNorm {
  constructor(w, name) { this.bias = w(`${name}.bias`), this.logs = w(`${name}.logs`); }

  inverse(y) {
    const {bias, logs} = this, D = bias.length;
    return y.map((v, i) => v * Math.exp(-logs[i % D]) - bias[i % D]);
  }

  backward(g) { return g.map((v, i) => v * Math.exp(this.logs[i % this.logs.length])); }
}

/** y = P L U x: solved row by row, so that no inverse matrix is needed. */
class InvertibleConv1x1 {
  constructor(w, name) {
    const sign = w(`${name}.sign`), logs = w(`${name}.log_diagonal`);
    this.D = sign.length, this.permutation = w(`${name}.permutation`);  // (P v)[i] = v[permutation[i]]
    this.lower = w(`${name}.lower`), this.upper = w(`${name}.upper`);
    this.diagonal = Float64Array.from(sign, (v, i) => v * Math.exp(logs[i]));
  }

  inverse(y) {
    const {D, permutation, lower, upper, diagonal} = this, x = new Float64Array(y.length);
    for (let b = 0; b < y.length; b += D) {
      for (let i = 0; i < D; i++) x[b + permutation[i]] = y[b + i];
      for (let i = 1; i < D; i++) x[b + i] -= dot(lower, i * D, x, b, i);
      for (let i = D - 1; i >= 0; i--)
        x[b + i] = (x[b + i] - dot(upper, i * D + i + 1, x, b + i + 1, D - 1 - i)) / diagonal[i];
    }
    return x;
  }

  backward(g) {  // U^T L^T P^T g
    const {D, permutation, lower, upper, diagonal} = this, d = new Float64Array(g.length);
    for (let b = 0; b < g.length; b += D) {
      for (let i = 0; i < D; i++) d[b + permutation[i]] = g[b + i];
      for (let i = 1; i < D; i++) add(lower, i * D, d[b + i], d, b, i);
      for (let i = D - 1; i >= 0; i--) {
        add(upper, i * D + i + 1, d[b + i], d, b + i + 1, D - 1 - i);
        d[b + i] *= diagonal[i];
      }
    }
    return d;
  }
}

class AffineCoupling {
  constructor(w, name, dim, config, B) {
    Object.assign(this, {dim, half: Math.floor(dim / 2), bound: config.scale_bound});
    this.net = new ConditionTCN(w, `${name}.net`, config, B);
  }

  inverse(y, c) {
    const {dim, half, bound} = this, n = dim - half;
    const ya = columns(y, dim, 0, half), yb = columns(y, dim, half, dim);
    const st = this.net.forward(ya, c), s = columns(st, 2 * n, 0, n), t = columns(st, 2 * n, n, 2 * n);
    this.s = s.map(v => bound * Math.tanh(v / bound));
    this.scaled = yb.map((v, i) => v - t[i]);  // exp(s) xb
    return cat(ya, this.scaled.map((v, i) => v * Math.exp(-this.s[i])), y.length / dim);
  }

  backward(g) {
    const {dim, half, bound, s, scaled} = this, B = g.length / dim;
    const ga = columns(g, dim, 0, half), gb = columns(g, dim, half, dim);
    const ds = gb.map((v, i) => (v * scaled[i] + 1) * (1 - (s[i] / bound) ** 2));  // 1: the log-det is sum(s)
    const dxa = this.net.backward(cat(ds, gb, B));
    return cat(ga.map((v, i) => v + dxa[i]), gb.map((v, i) => v * Math.exp(s[i])), B);
  }
}

class FlowStep {
  constructor(w, name, dim, config, B) {
    this.actnorm = new ActNorm(w, `${name}.actnorm`), this.conv = new InvertibleConv1x1(w, `${name}.conv`);
    this.coupling = new AffineCoupling(w, `${name}.coupling`, dim, config, B);
  }

  inverse(y, c) { return this.actnorm.inverse(this.conv.inverse(this.coupling.inverse(y, c))); }

  backward(g) { return this.actnorm.backward(this.conv.backward(this.coupling.backward(g))); }
}

// -----------------------------------------------------------------------------------------------------------
// The prior of the latents: z = m(c) + r, r_t = a1 r_{t-1} + a2 r_{t-2} + e_t, a1 = p1 (1 - p2), a2 = p2.
// iid: r = e

class Prior {
  constructor(w, name, config, B) {
    this.variance = w(`${name}.variance`), this.D = this.variance.length, this.frame = 0;
    this.partial = w(`${name}.partial`);  // (2, D), none for iid
    this.mean_net = w(`${name}.mean_net.cond.weight`) && new ConditionTCN(w, `${name}.mean_net`, config, 1);
    this.before = new Float64Array(B * this.D);  // r_{t-1}
    this.before2 = new Float64Array(B * this.D);  // r_{t-2}
  }

  /** m(c) (D,), the same for all faces; 0 without a mean network. */
  mean(c) { return this.mean_net ? this.mean_net.forward(c, c) : new Float64Array(this.D); }

  partials(i) {
    const {partial, D} = this;
    return partial ? [partial[i], partial[D + i]].map(p => 0.9995 * Math.tanh(p)) : [0, 0];
  }

  /** One frame on: r of each face and latent is next(n, what the two frames before expect, var e). */
  recur(next) {
    const {before, before2, D, frame} = this;
    for (let i = 0; i < D; i++) {
      let [p1, p2] = this.partials(i);
      if (frame < 2) p2 = 0;  // the first two frames know less
      if (frame < 1) p1 = 0;
      const innovation_variance = this.variance[i] * (1 - p1 ** 2) * (1 - p2 ** 2);
      for (let n = i; n < before.length; n += D) {
        const r = next(n, p1 * (1 - p2) * before[n] + p2 * before2[n], innovation_variance);
        before2[n] = before[n], before[n] = r;
      }
    }
    this.frame++;
    return before;
  }

  /** Standard normal noise (B, D) -> r (B, D). null: r stays, and what moves then is the voice's doing. */
  sample(noise) {
    const {before} = this;
    return this.recur((n, expected, var_e) => noise ? expected + Math.sqrt(var_e) * noise[n] : before[n]);
  }

  /** d log p(z_t | z_<t, c) / dz_t (B, D). */
  score(z, c) {
    const slope = new Float64Array(z.length), mean = this.mean(c);
    this.recur((n, expected, var_e) => {
      const r = z[n] - mean[n % this.D];
      slope[n] = (expected - r) / var_e;
      return r;
    });
    return slope;
  }
}

// -----------------------------------------------------------------------------------------------------------
// The multi-scale flow and its stream

class TalkingFlow {
  constructor(w, config, B) {
    const dims = Array.from({length: config.num_scales}, (_, i) => Math.floor(config.dim / 2 ** i));
    this.scales = dims.map((dim, i) => Array.from({length: config.steps_per_scale},
      (_, j) => new FlowStep(w, `scales.${i}.${j}`, dim, config, B)));
    this.sizes = [dims.at(-1), ...dims.slice(0, -1).map(dim => dim - Math.floor(dim / 2)).reverse()];
    this.prior = new Prior(w, "prior", config, B);
    Object.assign(this, {B, D: config.dim, cond_mean: w("cond_mean"), cond_std: w("cond_std")});
  }

  /** m(c) (D,): where the prior expects the latents of this sound. */
  prior_mean(c) { return this.prior.mean(c); }

  /** z (B, D), from the deepest scale up, through each step's `way`: "inverse" or "backward". */
  walk(z, way, c) {
    let first = this.sizes[0], x = columns(z, this.D, 0, first);
    this.scales.slice().reverse().forEach((scale, i) => {
      if (i) x = cat(x, columns(z, this.D, first, first += this.sizes[i]), this.B);
      for (const step of scale.slice().reverse()) x = step[way](x, c);
    });
    return x;
  }

  inverse(z, c) { return this.walk(z, "inverse", c); }

  /** d log p / dz (B, D) -> d log p(x_t | x_<t, c) / dx_t in the frame that `inverse` went last. The past is
   *  given, so only this frame's own path is walked. */
  backward(slope) { return this.walk(slope, "backward"); }
}

/** B faces while the sound arrives, a frame at a time. */
class Stream {
  constructor(page, w, B) {
    this.flow = new TalkingFlow(w, page.config, B), this.denoiser = new Prior(w, "prior", page.config, B);
    this.sigma = page.config.noise * page.interocular;  // of the noise that training added
    this.head = w("head"), this.rest = w("rest");  // (D,): which latents move the head; those of silence
  }

  /** See media/face.py: what z and c are beyond rest, scaled by `head` in the head's latents, else `lips`. */
  steer(z, c, {head = 1, lips = 1}) {
    if (head === 1 && lips === 1) return [z, c];
    const {rest, flow: {D}} = this, gain = n => this.head[n % D] ? head : lips;
    const steered = z.map((v, n) => rest[n % D] + gain(n) * (v - rest[n % D]));
    return [steered, c.map(v => Math.min(lips, 1) * (v + 1) - 1)];  // at rest c is -1
  }

  /** A column of sound (M,), noise (B, D) or null to freeze it -> landmarks (B, D). */
  push(column, noise, {denoise = true, ...controls} = {}) {
    const {flow, denoiser, sigma} = this;
    const heard = column.map((v, i) => (v - flow.cond_mean[i]) / flow.cond_std[i]);
    const mean = flow.prior_mean(heard), r = flow.prior.sample(noise);
    const [z, c] = this.steer(r.map((v, n) => v + mean[n % flow.D]), heard, controls);
    const x = flow.inverse(z, c), slope = denoiser.score(z, c);
    if (!denoise) return x;
    const score = flow.backward(slope);  // Tweedie's formula: the mean of clean landmarks, given noisy ones
    return x.map((v, n) => v + sigma ** 2 * score[n]);
  }
}

/** The faces x (B, D) with the eyes of others: latents that blink move lips and head too. */
function with_eyes_of(x, lively, D) {
  const out = x.slice();
  for (let b = 0; b < x.length; b += D)
    for (const eye of [36, 42])
      for (const v of [0, 1]) {
        const index = [0, 1, 2, 3, 4, 5].map(i => b + 2 * (eye + i) + v);
        const shift = index.reduce((sum, n) => sum + (x[n] - lively[n]) / 6, 0);  // to where the eye is
        for (const n of index) out[n] = lively[n] + shift;
      }
  return out;
}

/** Standard normal numbers (Box and Muller). */
const gaussian = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

/** Faces that speak a sound piece by piece. They hear `lead` columns ahead: their frames come later. */
class Talker {
  constructor(page, w, sampleRate, faces) {
    this.mel = new Mel(page.mel, page.fps, sampleRate);
    this.stream = new Stream(page, w, faces);
    this.lively = new Stream(page, w, faces);  // the faces as trained, for their eyes where they are steered
    this.waiting = page.config.lead, this.D = page.config.dim, this.size = faces * this.D;
  }

  /** Samples -> landmarks (B, D) of each whole frame. draw(size): its noise, or null. */
  push(samples, draw, controls) {
    const heard = this.mel.push(samples), skip = Math.min(this.waiting, heard.length);
    this.waiting -= skip;
    const {head = 1, lips = 1, denoise} = controls ?? {}, steered = head !== 1 || lips !== 1;
    return heard.slice(skip).map(c => {
      const noise = draw(this.size), x = this.stream.push(c, noise, controls);
      return steered ? with_eyes_of(x, this.lively.push(c, noise, {denoise}), this.D) : x;
    });
  }
}
