//! A zygote process without any VM. Its guests do what the program's first word says; those of the
//! template `here` are the real agent, on the machine where it is; those of `liar` break the rules of live
//! sandboxes, each as its first program says.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendFlags, send};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use zygote_protocol::{
    AgentMessage, Described, ExitStatus, FrameDecoder, HostMessage, Program, Resumed, Start, encode,
};
use zygote_runner::control::{
    FromRunner, FromZygote, PACKET_MAX_BYTES, Spent, ToRunner, ToZygote, decode,
    encode as encode_packet,
};
use zygote_runner::packet;

/// The real agent of a guest.
pub const AGENT_VERB: &str = "--agent";

/// Serves the engine to its end.
pub fn zygote() -> ! {
    let control = rustix::io::dup(rustix::stdio::stdin()).unwrap();
    let mut bytes = [0; PACKET_MAX_BYTES];
    let (length, _) = packet::receive(&control, &mut bytes).unwrap();
    if length == 0 {
        // The engine has been killed.
        std::process::exit(0)
    }
    let ToZygote::Load(load) = decode(&bytes[..length]).unwrap() else {
        panic!("it is loaded first");
    };
    let is_liar = load.snapshot.to_string_lossy().contains("/liar-");
    let is_here = load.snapshot.to_string_lossy().contains("/here-");
    tell(
        &control,
        &FromZygote::Loaded {
            memory_bytes: 1,
            vcpus: 1,
            missing_walls: vec![],
        },
    );
    for number in 1.. {
        let (length, descriptors) = packet::receive(&control, &mut bytes).unwrap();
        if length == 0 {
            break;
        }
        let Ok([agent, runner]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            panic!("two descriptors");
        };
        let (door, theirs) = packet::pair().unwrap();
        // A process that the engine can measure, and ends.
        let mut process = if is_here {
            agent_here(theirs, &load.snapshot.join(number.to_string()))
        } else {
            Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
        };
        let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).unwrap();
        let forked = encode_packet(&FromZygote::Forked { pid: number }).unwrap();
        if packet::send(&control, &forked, &[pidfd.as_fd()]).is_err() {
            // The engine has been killed.
            break;
        }
        let control = control.try_clone().unwrap();
        std::thread::spawn(move || {
            if is_here {
                run_here(&door, agent, &runner, &pidfd);
                process.wait().unwrap();
            } else if is_liar {
                let _ = lie(number, UnixStream::from(agent), &runner);
                let _ = process.kill();
                process.wait().unwrap();
            } else {
                let _ = play(number, UnixStream::from(agent), &runner);
                // The engine may have ended it.
                let _ = process.kill();
                process.wait().unwrap();
            }
            tell(
                &control,
                &FromZygote::Ended {
                    pid: number,
                    status: 9,
                    spent: Spent::default(),
                },
            );
        });
    }
    std::process::exit(0)
}

/// What a runner does besides running its machine: until it is let go of, it passes streams on.
fn run_here(door: &OwnedFd, agent: OwnedFd, control: &OwnedFd, process: &OwnedFd) {
    let pass_on = |stream: OwnedFd| packet::send(door, b"!", &[stream.as_fd()]);
    // An agent that has ended takes none.
    let _ = pass_on(agent);
    let parked = encode_packet(&FromRunner::Parked).unwrap();
    let _ = packet::send(control, &parked, &[]);
    loop {
        let mut fds = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(process, PollFlags::IN),
        ];
        poll(&mut fds, None).unwrap();
        let has_ended = !fds[1].revents().is_empty();
        if has_ended {
            return;
        }
        let mut bytes = [0; PACKET_MAX_BYTES];
        let (length, descriptors) = packet::receive(control, &mut bytes).unwrap();
        if length == 0 {
            let _ = pidfd_send_signal(process, Signal::KILL);
            return;
        }
        match decode(&bytes[..length]).unwrap() {
            ToRunner::NewStream => {
                for stream in descriptors {
                    let _ = pass_on(stream);
                }
            }
            // There is no machine to fork.
            ToRunner::Branch { number } => {
                let message = "it is no machine".to_owned();
                let failed = FromRunner::BranchFailed { number, message };
                let _ = packet::send(control, &encode_packet(&failed).unwrap(), &[]);
            }
        }
    }
}

/// The real agent, as the first process of a namespace, so that nothing of it is left when it is killed.
fn agent_here(streams: OwnedFd, temporary: &std::path::Path) -> std::process::Child {
    let program = std::env::current_exe().unwrap();
    std::fs::create_dir_all(temporary).unwrap();
    Command::new("unshare")
        .env("TMPDIR", temporary)
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(program)
        .arg(AGENT_VERB)
        .stdin(Stdio::from(streams))
        .spawn()
        .unwrap()
}

fn tell(control: &OwnedFd, message: &FromZygote) {
    let bytes = encode_packet(message).unwrap();
    // The engine may be gone already.
    let _ = send(control, &bytes, SendFlags::NOSIGNAL);
}

struct Agent {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Agent {
    fn hear(&mut self) -> Option<HostMessage> {
        loop {
            if let Some(message) = self.decoder.next_message().ok()? {
                return Some(message);
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.decoder.extend(&bytes[..count]),
            }
        }
    }

    fn say(&mut self, message: &AgentMessage) -> Option<()> {
        self.stream.write_all(&encode(message).unwrap()).ok()
    }

    fn print(&mut self, data: Vec<u8>) -> Option<()> {
        self.say(&AgentMessage::Stdout { process: 1, data })
    }

    fn exit(&mut self, code: u8) -> Option<()> {
        let status = ExitStatus::Code(code);
        self.say(&AgentMessage::Exited { process: 1, status })
    }
}

/// `None` once the engine has let go.
fn play(number: u32, stream: UnixStream, control: &OwnedFd) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    let mut agent = Agent {
        stream,
        decoder: FrameDecoder::default(),
    };
    let parked = encode_packet(&FromRunner::Parked).unwrap();
    let _ = packet::send(control, &parked, &[]);
    agent.hear()?;
    let mut files = Vec::new();
    let start = loop {
        match agent.hear()? {
            HostMessage::Put(put) => files.push(format!("{put:?}")),
            HostMessage::Start(start) => break start,
            _ => {}
        }
    };
    let mut random_sample = vec![0; 32];
    random_sample[..4].copy_from_slice(&number.to_le_bytes());
    agent.say(&AgentMessage::Activated { random_sample })?;
    agent.say(&AgentMessage::Started { process: 1, pid: 2 })?;
    obey(&mut agent, &start, &files)?;
    // Until the engine lets go.
    let _ = packet::receive(control, &mut [0]);
    Some(())
}

/// Becomes somebody, and breaks a rule once it is asked for a process. `None` once the engine has let go.
fn lie(number: u32, stream: UnixStream, control: &OwnedFd) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    let mut agent = Agent {
        stream,
        decoder: FrameDecoder::default(),
    };
    let parked = encode_packet(&FromRunner::Parked).unwrap();
    let _ = packet::send(control, &parked, &[]);
    agent.hear()?;
    let mut random_sample = vec![0; 32];
    random_sample[..4].copy_from_slice(&number.to_le_bytes());
    agent.say(&AgentMessage::Activated { random_sample })?;
    let (process, words) = loop {
        if let HostMessage::Start(start) = agent.hear()? {
            match start.program {
                Program::Command(words) => break (start.process, words),
                Program::Context => return display_without_end(&mut agent, start.process),
                _ => {}
            }
        }
    };
    let status = ExitStatus::Code(0);
    let output = |offset, length: usize| AgentMessage::Output {
        process,
        reader: 0,
        offset,
        stream: zygote_protocol::Stream::Stdout,
        data: vec![b'x'; length],
    };
    if words[0] != b"silent" {
        agent.say(&AgentMessage::Started { process, pid: 7 })?;
    }
    if words[0].starts_with(b"resume-") {
        while agent.hear().is_some() {}
        return lie_again(control, &words[0]);
    }
    match &words[0][..] {
        b"unknown" => agent.say(&AgentMessage::Started {
            process: 99,
            pid: 1,
        })?,
        b"ended" => agent.say(&AgentMessage::Ended {
            process: 99,
            status,
            output_end: 0,
        })?,
        b"overflow" => agent.say(&output(u64::MAX, 1))?,
        b"twice" => {
            for _ in 0..2 {
                agent.say(&AgentMessage::Ended {
                    process,
                    status,
                    output_end: 0,
                })?;
            }
        }
        b"offset" => agent.say(&output(5, 1))?,
        b"window" => {
            for piece in 0..200 {
                agent.say(&output(piece * 60_000, 60_000))?;
            }
        }
        b"input" => agent.say(&AgentMessage::InputTaken {
            process,
            total: 1000,
        })?,
        b"described" => agent.say(&AgentMessage::Described { processes: vec![] })?,
        b"stranger" => agent.say(&AgentMessage::Warmed)?,
        b"garbage" => agent.stream.write_all(&[0xff; 64]).ok()?,
        b"hangup" => return None,
        b"silent" => {}
        other => panic!("{other:?}"),
    }
    while agent.hear().is_some() {}
    Some(())
}

/// A guest that another engine has asked for its processes, and lies about them. `None` once that has let
/// go.
fn lie_again(control: &OwnedFd, lie: &[u8]) -> Option<()> {
    let mut bytes = [0; PACKET_MAX_BYTES];
    let (length, mut descriptors) = packet::receive(control, &mut bytes).ok()?;
    if length == 0 {
        return None;
    }
    let stream = UnixStream::from(descriptors.pop()?);
    stream.set_nonblocking(false).ok()?;
    let mut agent = Agent {
        stream,
        decoder: FrameDecoder::default(),
    };
    while agent.hear()? != HostMessage::Resume {}
    let told = |process, note: &[u8]| {
        AgentMessage::Resumed(Resumed {
            described: Described {
                process,
                pid: 7,
                kept_from: u64::MAX,
                kept_to: u64::MAX,
                status: None,
            },
            output_end: Some(u64::MAX),
            note: note.to_vec(),
            ran_ms: u64::MAX,
            input_received: 0,
            input_taken: u64::MAX,
            takes_input: true,
            context: None,
        })
    };
    match lie {
        b"resume-numbers" => agent.say(&told(u32::MAX, b""))?,
        b"resume-backwards" => {
            agent.say(&told(2, b""))?;
            agent.say(&told(1, b""))?;
        }
        b"resume-note" => agent.say(&told(1, &[0xff; 20_000]))?,
        b"resume-end" => {
            agent.say(&told(5, b""))?;
            agent.say(&AgentMessage::ResumedEnd { last: 4 })?;
        }
        b"resume-last" => agent.say(&AgentMessage::ResumedEnd { last: u32::MAX })?,
        b"resume-other" => agent.say(&AgentMessage::Warmed)?,
        b"resume-silent" => {}
        other => panic!("{other:?}"),
    }
    if lie == b"resume-numbers" {
        agent.say(&AgentMessage::ResumedEnd { last: u32::MAX })?;
    }
    while agent.hear().is_some() {}
    Some(())
}

/// An interpreter waits until what it displays has been taken; this one does not.
fn display_without_end(agent: &mut Agent, process: u32) -> Option<()> {
    agent.say(&AgentMessage::Started { process, pid: 7 })?;
    while !matches!(agent.hear()?, HostMessage::Cell { .. }) {}
    let piece = AgentMessage::CellPiece {
        process,
        offset: 0,
        last: true,
        // A display of nothing (CellEvent, as postcard).
        data: vec![0, 0],
    };
    // In one piece: each is there before the one before it can have been taken.
    let all = encode(&piece).unwrap().repeat(50);
    agent.stream.write_all(&all).ok()?;
    while agent.hear().is_some() {}
    Some(())
}

fn obey(agent: &mut Agent, start: &Start, files: &[String]) -> Option<()> {
    let Program::Command(words) = &start.program else {
        agent.print(format!("{:?}", start.program).into_bytes())?;
        return agent.exit(0);
    };
    let words: Vec<String> = words
        .iter()
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    match words[0].as_str() {
        "echo" => agent.print(words[1..].join(" ").into_bytes())?,
        "bytes" => agent.print(vec![0xff, 0, b'x'])?,
        "files" => agent.print(files.join("\n").into_bytes())?,
        "cat" => {
            while let Some(HostMessage::Stdin { data, .. }) = agent.hear() {
                agent.print(data)?;
            }
        }
        "flood" => loop {
            agent.print(vec![b'x'; 60_000])?;
        },
        "die" => return None,
        // Until a signal comes, or the engine lets go.
        "wait" => {
            agent.print(b"waiting".to_vec())?;
            let Some(HostMessage::Signal { signal, .. }) = agent.hear() else {
                return None;
            };
            agent.print(format!(" {signal}").into_bytes())?;
        }
        other => panic!("{other}"),
    }
    agent.exit(3)
}
