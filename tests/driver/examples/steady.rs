//! A guest that sends a little all the time, for as long as a file exists.
//!
//! ```text
//! steady SOCKET FILE
//! ```
//! Prints how many frames it sent, when the backend has given all of them back.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use vmflow_driver::frame::Ends;
use vmflow_driver::net::{Config, Device};

/// Frames at a time.
const BATCH: u16 = 16;
/// Bytes of each.
const BYTES: usize = 64;
/// Between two batches: the machine is for others as well.
const PAUSE: Duration = Duration::from_millis(20);
/// A backend that gives nothing back for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, file] = arguments.as_slice() else { return Err("steady SOCKET FILE".into()) };
    let mut device = Device::connect(Path::new(socket), Config::default())?;
    device.settle()?;
    let pair = device.first();
    let frame = Ends::default().numbered(BYTES, 0);
    pair.transmit.prefill(|_| &frame)?;
    let (mut sent, mut back, mut moved) = (0, 0, Instant::now());
    loop {
        let go_on = Path::new(file).exists();
        if go_on && sent - back < u64::from(BATCH) {
            sent += u64::from(pair.transmit.send_batch(BATCH)?);
        }
        let taken = pair.transmit.reclaim()?;
        back += taken;
        if taken > 0 {
            moved = Instant::now();
        } else if !go_on && back == sent {
            break;
        } else if moved.elapsed() > PATIENCE {
            return Err(format!("nothing came back any more after {back} of {sent} frames").into());
        }
        std::thread::sleep(PAUSE);
    }
    println!("{sent}");
    Ok(())
}
