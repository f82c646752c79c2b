"""Containers of sound and pictures through PyAV (optional): every frame, in its order, with its true time.

Times are seconds since the file's own zero, the same one for sound and picture: either may begin later."""

import heapq
import importlib.util
import itertools
import os
from collections import deque
from pathlib import Path

import numpy as np

from media.console import Skip, UserError

VIDEOS = (".mpg", ".mpeg", ".mp4", ".m4v", ".mkv", ".avi", ".mov", ".webm", ".wmv", ".flv", ".ts", ".3gp")
VIDEOS += (".mts", ".m2ts", ".vob", ".ogv", ".mxf", ".asf", ".f4v", ".3g2", ".mpv", ".divx")
WHOLE = (0.0, np.inf)  # all of a file, as the part (start, stop) of it to read
HELD_BACK = 16  # frames that a decoder may hold back to put them into the order they are shown in (H.264)
# samples by which an encoder is late; a container with times of its own has taken them off, AVI cannot
PRIMING = {"mp3": 1105, "mp3float": 1105, "mp2": 481, "mp2float": 481, "aac": 1024, "ac3": 256}


def require(package, install, what="videos"):
    """Raises UserError with the line that installs a missing optional package."""
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # it stands in sys.modules without a spec
        found = None
    if not found:
        raise UserError(f"{package}: not installed vs needed for {what}. {install}")


def open_container(path):
    """PyAV's container; raises Skip where the file is none, and says what it is instead."""
    require("av", "pip install av", Path(path).suffix or "this file")
    import av

    try:  # the prefix: 10:30.mpg is no protocol named 10
        return av.open(f"file:{os.path.abspath(path)}", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as e:
        with open(path, "rb") as f:
            head = f.read(64)
        pointer = head.startswith(b"version https://git-lfs")
        why = "a git-lfs pointer: git lfs pull" if pointer else type(e).__name__ if head else "zero bytes"
        raise Skip("not a video", why) from None


def decode(container, stream, part=WHOLE):
    """(seconds, frame) of a stream within part = (start, stop): of sound each later than the last one, of
    pictures none earlier (see even_out). What does not decode is lost."""
    origin, last = zero(container) - 1e-4, -np.inf  # start_time is rounded: nothing of 0 comes before it
    # key frames are not everywhere
    frames = stamped(container, stream, origin + part[0] - 5 if part[0] else 0)
    for time, frame in in_order(frames) if stream.type == "video" else frames:
        time -= origin
        if time >= part[1]:
            return
        if (time > last or (time == last and stream.type == "video")) and time >= part[0]:
            last = time
            yield max(time - 1e-4, 0.0), frame


def even_out(times):
    """Times of pictures (F,) that never fall -> times, and which of them to keep (F,).

    A picture without a stamp of its own (MPEG) may be given that of the next one: from a gap of two steps to
    where two have the same time all are one step late. Of two that are still equal the first is kept."""
    times = np.array(times, float)
    step = np.median(np.diff(times)) if len(times) > 1 else 0.0
    for j in np.flatnonzero(np.diff(times) == 0) + 1:
        gaps = np.diff(times[:j])
        late = np.flatnonzero((gaps > 1.5 * step) & (gaps < 2.5 * step))
        if len(late) and j - late[-1] < 100:
            times[late[-1] + 1 : j] -= step
    return times, np.diff(times, prepend=-np.inf) > 0


def zero(container):
    """The time that counts as 0: that of the first thing in the file, picture or sound."""
    return (container.start_time or 0) / 1e6


class Stamps:
    """The time stamps of packets' frames. AVI has none but places in the file, and these in the order of
    decoding."""

    def __init__(self, container, stream):
        self.avi, self.first, self.moved = container.format.name == "avi", 0, 0
        if self.avi and stream.type == "video":
            first = [packet.dts for packet in itertools.islice(container.demux(stream), 2)]
            if len(first) == 2 and None not in first and first[1] > first[0] + 1:
                # a writer moves all but the first picture by whole frames, to be later than the encoder's own
                # delay
                self.first, self.moved = first[0], first[1] - first[0] - 1
            container.seek(0)

    def __call__(self, packet):
        if not self.avi or packet.dts is None:
            return packet.pts
        return packet.dts - (self.moved if packet.dts > self.first else 0)


def stamped(container, stream, start=0.0):
    """(seconds, frame) as the decoder gives them, from about `start` on."""
    import av

    stamp_of, own = Stamps(container, stream), {}
    if start:
        container.seek(int(start * 1e6))
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            if packet.pts is not None:
                own[packet.pts] = stamp_of(packet)
            frames = packet.decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:
            continue
        for frame in frames:
            stamp = own.pop(frame.pts, frame.pts)
            if stamp is None:
                stamp = frame.dts
            if len(own) > 1000:  # those of packets that gave no frame
                own.clear()
            if stamp is not None:
                yield float(stamp * (frame.time_base or stream.time_base)), frame


def in_order(frames):
    """The decoder shows frames in their order; where only the times of decoding are known, those are not:
    sort them."""
    times, waiting = [], deque()
    for time, frame in frames:
        heapq.heappush(times, time)
        waiting.append(frame)
        if len(waiting) > HELD_BACK:
            yield heapq.heappop(times), waiting.popleft()
    while waiting:
        yield heapq.heappop(times), waiting.popleft()


def picture_times(path):
    """When the pictures of a video are shown, (F,) seconds, and their size [width, height] and pixels' width
    / height; nothing is decoded. No pictures: (None, None, 1)."""
    with open_container(path) as container:
        if not container.streams.video:
            return None, None, 1.0
        stream = container.streams.video[0]
        stamp_of = Stamps(container, stream)
        stamps = [stamp_of(packet) for packet in container.demux(stream) if packet.size]
        times = np.sort([float(t * stream.time_base) for t in stamps if t is not None]) - zero(container)
        return even_out(times)[0], [stream.width, stream.height], float(stream.sample_aspect_ratio or 1)


def decoded_sound(path, part=WHOLE):
    """Yield (seconds, float32 (n, C), rate) of a container's sound; where more than 10 ms of it is lost,
    silence."""
    with open_container(path) as container:
        if not container.streams.audio:
            raise Skip("no sound", "the file has no sound stream")
        stream = container.streams.audio[0]
        begin = rate = layout = same = None
        count = late = 0  # samples given so far; seconds by which the encoder is late
        for time, frame in decode(container, stream, part):
            if begin is None:
                rate, layout = frame.sample_rate, frame.layout
                channels = layout.nb_channels
                if container.format.name == "avi":
                    late = PRIMING.get(stream.codec_context.name, 0) / rate
                begin = time - late
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):  # files joined end to end
                frame, same = resampled(frame, rate, layout, same)
            block = floats(frame)
            lost = round((time - late - begin) * rate) - count
            if lost > rate / 100:
                if lost > 3600 * rate:
                    raise Skip("sound times", f"{lost / rate:.0f} s without sound")
                for start in range(0, lost, 1 << 18):
                    yield (
                        begin + count / rate,
                        np.zeros((min(lost - start, 1 << 18), channels), np.float32),
                        rate,
                    )
                    count += min(lost - start, 1 << 18)
            elif lost < -rate / 100:  # twice the same time
                block = block[-lost:]
            if len(block):
                yield begin + count / rate, block, rate
                count += len(block)


def resampled(frame, rate, layout, resampler):
    """A frame of another rate or layout than the first of its file, and what carries on to the next such
    frame."""
    import av

    key = frame.sample_rate, frame.layout.nb_channels
    if not resampler or resampler[0] != key:
        resampler = key, av.AudioResampler(format="flt", layout=layout, rate=rate)
    frame.pts = None
    return resampler[1].resample(frame), resampler


def floats(frames):
    """Samples of a frame, or of a list of them, as float32 (n, C) in -1..1."""
    if isinstance(frames, list):
        return np.concatenate([floats(frame) for frame in frames]) if frames else np.zeros((0, 1), np.float32)
    a = frames.to_ndarray()
    a = a.T if frames.format.is_planar else a.reshape(-1, frames.layout.nb_channels)
    if a.dtype == np.uint8:
        return (a.astype(np.float32) - 128) / 128
    scale = np.float32(np.iinfo(a.dtype).max + 1.0) if a.dtype.kind == "i" else np.float32(1)
    return a.astype(np.float32) / scale
