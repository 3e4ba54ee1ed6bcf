//! `zygote bench --url`: an engine under load, as its users see it.

mod drive;
mod tls;

use crate::args::BenchArgs;
use crate::engine;
use crate::failure::usage;
use crate::out::{complain, say};
use anyhow::anyhow;
use drive::{Course, Load, Outcome};
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zygote_api::{ErrorCode, ExecRequest, Failure};
use zygote_bench::{Samples, draw_load};
use zygote_daemon::{Client, ClientError};

/// For how long, unless the user says so.
const DURATION: Duration = Duration::from_secs(10);
/// Clients that ask one after the other, and connections of those that do not wait.
const CLIENTS: u32 = 8;
const CONNECTIONS: u32 = 16;

/// Where an engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Tcp(String),
    Tls(String),
    Unix(PathBuf),
}

/// Measures; gives back the exit code.
pub fn run(url: &str, args: &BenchArgs) -> anyhow::Result<u8> {
    let target = target(url)?;
    let course = match args.rate {
        Some(rate) => Course::Open { rate },
        None => Course::Closed,
    };
    let connections = match course {
        Course::Closed => args.clients.unwrap_or(CLIENTS),
        Course::Open { .. } => CONNECTIONS,
    };
    let load = Load {
        course,
        duration: args.duration.and_then(|time| time.0).unwrap_or(DURATION),
        request: ExecRequest {
            template: args.template.clone(),
            code: Some(args.code.as_deref().unwrap_or("print(1+1)").into()),
            ..ExecRequest::default()
        },
    };
    if !args.json && std::io::stderr().is_terminal() {
        complain!("zygote: asking {url} for {} s", load.duration.as_secs());
    }
    let connector = matches!(target, Target::Tls(_)).then(tls::connector);
    let connector = connector.transpose()?;
    let outcome = engine::runtime()?.block_on(async {
        let mut clients = Vec::new();
        for _ in 0..connections {
            let key = args.key.as_deref();
            clients.push(connect(&target, connector.as_ref(), key).await?);
        }
        anyhow::Ok(drive::run(clients, &load).await)
    })?;
    if outcome.answered.count == 0 {
        return Err(unanswered(&outcome).into());
    }
    if let Some(folder) = &args.plots {
        draw(folder, &outcome)?;
    }
    if args.json {
        say!("{}", object(url, &load, connections, &outcome));
    } else {
        show(&load, connections, &outcome);
    }
    Ok(0)
}

/// Nothing that was measured is no measurement.
fn unanswered(outcome: &Outcome) -> Failure {
    let codes = outcome.refused.iter();
    let codes: Vec<String> = codes
        .map(|(code, count)| format!("{count} {code}"))
        .collect();
    let message = "the engine has not run any of what it was asked for";
    Failure::new(ErrorCode::EngineUnreachable, message).cause(codes.join(", "))
}

fn target(url: &str) -> anyhow::Result<Target> {
    if let Some(path) = url.strip_prefix("unix:") {
        return Ok(Target::Unix(path.into()));
    }
    let (rest, is_tls) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
        (Some(rest), _) => (rest, false),
        (None, Some(rest)) => (rest, true),
        (None, None) => {
            let message = format!("--url {url}: it is neither http(s)://HOST:PORT nor unix:PATH");
            return Err(usage(message).into());
        }
    };
    let host = rest.trim_end_matches('/');
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let address = match (has_port, is_tls) {
        (true, _) => host.to_owned(),
        (false, true) => format!("{host}:443"),
        (false, false) => format!("{host}:80"),
    };
    Ok(if is_tls {
        Target::Tls(address)
    } else {
        Target::Tcp(address)
    })
}

async fn connect(
    target: &Target,
    connector: Option<&TlsConnector>,
    key: Option<&str>,
) -> anyhow::Result<Client> {
    let client = match target {
        Target::Unix(path) => Client::connect(path).await?,
        Target::Tcp(address) | Target::Tls(address) => {
            let stream = TcpStream::connect(address).await;
            let stream = stream.map_err(ClientError::Connect)?;
            // Small requests wait for nothing.
            let _ = stream.set_nodelay(true);
            match connector {
                None => Client::over(stream).await?,
                Some(connector) => {
                    Client::over(tls::shake_hands(connector, address, stream).await?).await?
                }
            }
        }
    };
    match key.filter(|key| !key.is_empty()) {
        None => Ok(client),
        Some(key) => client
            .with_key(key)
            .ok_or_else(|| usage("--key: it has what no key has").into()),
    }
}

fn course(load: &Load, connections: u32) -> String {
    match load.course {
        Course::Closed => {
            format!("{connections} clients, each asks again as soon as it is answered")
        }
        Course::Open { rate } => {
            format!("{rate} requests a second, whether those before are answered or not")
        }
    }
}

fn show(load: &Load, connections: u32, outcome: &Outcome) {
    let Outcome {
        answered,
        in_guest,
        refused,
        took,
    } = outcome;
    let rate = answered.count as f64 / took.as_secs_f64();
    say!("{}; {:.1} s", course(load, connections), took.as_secs_f64());
    say!("{} answered, {rate:.1} a second", answered.count);
    for (code, count) in refused {
        say!("{count} not: {code}");
    }
    say!(
        "{:<34} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "ms",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "longest"
    );
    let row = |name: &str, samples: &Samples| {
        let at = |of_thousand| samples.per_mille(of_thousand);
        say!(
            "{name:<34} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
            at(500),
            at(900),
            at(990),
            at(999),
            samples.max_ms
        );
    };
    let from = match load.course {
        Course::Closed => "from the request to its answer",
        Course::Open { .. } => "from when it was due to its answer",
    };
    row(from, answered);
    row("of that, as the engine tells it", in_guest);
}

fn object(url: &str, load: &Load, connections: u32, outcome: &Outcome) -> serde_json::Value {
    let times = |samples: &Samples| {
        json!({
            "count": samples.count,
            "min_ms": samples.min_ms,
            "p50_ms": samples.per_mille(500),
            "p90_ms": samples.per_mille(900),
            "p99_ms": samples.per_mille(990),
            "p999_ms": samples.per_mille(999),
            "max_ms": samples.max_ms,
        })
    };
    let (clients, rate) = match load.course {
        Course::Closed => (Some(connections), None),
        Course::Open { rate } => (None, Some(rate)),
    };
    json!({
        "url": url,
        "clients": clients,
        "rate": rate,
        "seconds": outcome.took.as_secs_f64(),
        "answered": outcome.answered.count,
        "answered_per_second": outcome.answered.count as f64 / outcome.took.as_secs_f64(),
        "refused": outcome.refused,
        "latency": times(&outcome.answered),
        "engine": times(&outcome.in_guest),
    })
}

fn draw(folder: &Path, outcome: &Outcome) -> anyhow::Result<()> {
    let lines = [
        ("to the answer", &outcome.answered),
        ("as the engine tells it", &outcome.in_guest),
    ];
    draw_load(folder, "Requests to an engine under load", &lines).map_err(|error| {
        anyhow!(
            "cannot draw into {}: {error}; name another folder with --plots",
            folder.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_a_host_or_a_socket() {
        let tcp = |text: &str| Target::Tcp(text.to_owned());
        assert_eq!(
            target("http://127.0.0.1:7070/").unwrap(),
            tcp("127.0.0.1:7070")
        );
        assert_eq!(target("http://[::1]:7070").unwrap(), tcp("[::1]:7070"));
        assert_eq!(target("http://engine").unwrap(), tcp("engine:80"));
        assert_eq!(
            target("unix:/run/x").unwrap(),
            Target::Unix("/run/x".into())
        );
        assert_eq!(
            target("https://engine/").unwrap(),
            Target::Tls("engine:443".to_owned())
        );
        for bad in ["ftp://engine", "engine:7070", ""] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }
}
