//! How many frames a second the driver moves through a backend.
//!
//! ```text
//! flood SOCKET transmit|echo [frames] [bytes]
//! ```
//! `transmit`: as fast as the backend takes them. `echo`: the backend sends them back; no more are on
//! their way than there are buffers for. Polls both ways, no call asked for.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use vmflow_driver::frame::Ends;
use vmflow_driver::net::{Config, Device};

/// What one look at a queue moves.
const BATCH: u16 = 64;
/// Frames on their way when they come back.
const WINDOW: u64 = 200;
/// A backend that moves nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, direction, rest @ ..] = arguments.as_slice() else {
        return Err("flood SOCKET transmit|echo [frames] [bytes]".into());
    };
    let echo = match direction.as_str() {
        "transmit" => false,
        "echo" => true,
        other => return Err(format!("{other}: transmit or echo?").into()),
    };
    let frames = rest.first().map_or(Ok(10_000_000), |frames| frames.parse())?;
    let bytes = rest.get(1).map_or(Ok(64), |bytes| bytes.parse())?;
    let mut device = Device::connect(Path::new(socket), Config::default())?;
    device.settle()?;
    let time = flood(&mut device, frames, bytes, echo)?;
    let (sent, received) = device.totals();
    let rate = Duration::from_secs(frames).as_secs_f64() / time.as_secs_f64() / 1e6;
    let kicks = device.first().transmit.queue.notifications().kicks;
    println!("{rate:.2} million frames/s; sent {sent:?}, received {received:?} in {time:?}, {kicks} kicks");
    Ok(())
}

fn flood(device: &mut Device, frames: u64, bytes: usize, echo: bool) -> Result<Duration, Box<dyn Error>> {
    let pair = device.first();
    let frame = Ends::default().numbered(bytes, 0);
    pair.receive.refill()?;
    pair.transmit.prefill(|_| &frame)?;
    let begin = Instant::now();
    let (mut sent, mut done, mut moved) = (0, 0, begin);
    while done < frames {
        pair.receive.queue.refuse_calls();
        pair.transmit.queue.refuse_calls();
        let window = if echo { WINDOW - (sent - done) } else { u64::from(BATCH) };
        let most = u16::try_from(window.min(frames - sent)).unwrap_or(BATCH).min(BATCH);
        sent += u64::from(pair.transmit.send_batch(most)?);
        let taken = pair.transmit.reclaim()?;
        let back = if echo { pair.receive.drain_batch(BATCH)?.traffic.frames } else { taken };
        done += back;
        if back > 0 {
            moved = Instant::now();
        } else if moved.elapsed() > PATIENCE {
            return Err(format!("nothing moved any more after {done} frames").into());
        }
    }
    Ok(begin.elapsed())
}
