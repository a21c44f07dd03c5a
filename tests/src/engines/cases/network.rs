//! The default bridge, published ports, names, networks of the user's own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::DEADLINE;

super::engine_cases!(network;
    [both quick] published_port;
    [docker] name_servers;
    [both] default_bridge, container_to_container, container_to_host, by_name, none, of_another_container, large_transfer,
        datagrams, several_networks, addresses_of_ones_own, connect_later, port_command, udp_port;
    [both vm] host_is_refused);

/// Answers each connection with its name.
const WEB: &str =
    "echo hello from $(hostname) >/tmp/index.html; echo ready; exec httpd -f -p 80 -h /tmp";

/// `run --detach` of a server on the default bridge.
fn serve(engine: &Engine, name: &str, options: &[&str], script: &str) -> Result<()> {
    let named = ["run", "--detach", "--name", name, "--hostname", name];
    engine
        .call(&[&named[..], options, &[IMAGE, "sh", "-c", script]].concat())?
        .ok()?;
    engine.wait_for_log(name, "ready")
}

/// What a web server on the host's loopback address answers. It may not listen yet.
fn fetch(port: u16) -> Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)
        .with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("reading the answer")?;
    Ok(answer)
}

fn connected(engine: &Engine, options: &[&str], script: &str) -> Result<crate::process::Output> {
    engine.call(&[&["run", "--rm"], options, &[IMAGE, "sh", "-c", script]].concat())
}

/// Retries in the container: a server that was just started may not listen yet.
fn get(url: &str) -> String {
    // The statically linked wget of Debian crashes with a time limit of its own.
    format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do timeout 5 wget -qO- {url} && exit; sleep 0.3; done; exit 1"
    )
}

fn default_bridge(engine: &Engine) -> Result<()> {
    let script = "ip -4 addr show dev eth0; ip route; cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address; cat /etc/resolv.conf";
    let output = connected(engine, &["--mac-address", "02:11:22:33:44:55"], script)?.ok()?;
    let network = if engine.podman() { "10.88." } else { "172.17." };
    output.says(&[
        network,
        "default via",
        "1500\n02:11:22:33:44:55\n",
        "scope global eth0",
    ])?;
    Ok(())
}

fn none(engine: &Engine) -> Result<()> {
    let output = engine.script(&["--cap-add", "NET_RAW"], "ls /sys/class/net; ip -4 addr show dev lo; ping -c1 -w5 127.0.0.1 >/dev/null && echo loops")?.ok()?;
    let output = output.says(&["lo\n", "127.0.0.1/8", "loops"])?;
    ensure!(!output.text().contains("eth0"), "{output}");
    Ok(())
}

fn published_port(engine: &Engine) -> Result<()> {
    serve(
        engine,
        "made-web",
        &["--publish", "127.0.0.1:8081:80"],
        &format!(
            "{} & nc -lp 81 >/dev/null; sleep 1000",
            WEB.replace("exec ", "")
        ),
    )?;
    // Listening is told by a connection from inside.
    engine
        .exec("made-web", &get("http://127.0.0.1/"))?
        .ok()?
        .says(&["hello from made-web"])?;
    let answer = fetch(8081)?;
    ensure!(answer.contains("hello from made-web"), "{answer}");
    engine.remove(&["made-web"])
}

fn port_command(engine: &Engine) -> Result<()> {
    serve(
        engine,
        "made-port",
        &["--publish", "127.0.0.1:8082:80"],
        WEB,
    )?;
    engine
        .call(&["port", "made-port"])?
        .ok()?
        .says(&["80/tcp -> 127.0.0.1:8082"])?;
    engine.remove(&["made-port"])
}

fn udp_port(engine: &Engine) -> Result<()> {
    // Debian's busybox has no server for datagrams.
    let program = engine.path("inside");
    std::fs::copy("/proc/self/exe", &program)?;
    let volume = format!("{program}:/inside:ro");
    let options = ["--volume", &volume, "--publish", "127.0.0.1:8083:5000/udp"];
    let script = format!("exec /inside {} echo-datagrams 5000", crate::inside::INSIDE);
    serve(engine, "made-udp", &options, &script)?;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    socket.connect("127.0.0.1:8083")?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let mut answer = [0; 16];
    socket.send(b"echo")?;
    let length = socket.recv(&mut answer).context("waiting for the echo")?;
    ensure!(&answer[..length] == b"echo", "another answer");
    engine.remove(&["made-udp"])
}

fn address(engine: &Engine, name: &str) -> Result<String> {
    engine.field(name, "{{.NetworkSettings.IPAddress}}")
}

fn container_to_container(engine: &Engine) -> Result<()> {
    serve(engine, "made-a", &[], WEB)?;
    let url = format!("http://{}/", address(engine, "made-a")?);
    connected(engine, &[], &get(&url))?
        .ok()?
        .says(&["hello from made-a"])?;
    engine.remove(&["made-a"])
}

fn container_to_host(engine: &Engine) -> Result<()> {
    let listener = std::net::TcpListener::bind("0.0.0.0:8090")?;
    let server = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"from the host\n")?;
        Ok(())
    });
    let script = "nc $(ip route | awk '/default/ {print $3}') 8090 </dev/null";
    connected(engine, &[], script)?
        .ok()?
        .says(&["from the host"])?;
    ensure!(
        server.join().is_ok_and(|result| result.is_ok()),
        "the server failed"
    );
    Ok(())
}

fn by_name(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-net"])?.ok()?;
    serve(engine, "made-named", &["--network", "made-net"], WEB)?;
    connected(
        engine,
        &["--network", "made-net"],
        &get("http://made-named/"),
    )?
    .ok()?
    .says(&["hello from made-named"])?;
    engine.remove(&["made-named"])?;
    engine.call(&["network", "rm", "made-net"])?.ok()?;
    Ok(())
}

/// Docker's own name server on a user's network: it asks others with the container's address.
fn name_servers(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-names"])?.ok()?;
    let gateway = engine.field("made-names", "{{(index .IPAM.Config 0).Gateway}}")?;
    let server = std::net::UdpSocket::bind((gateway.as_str(), 53))?;
    server.set_read_timeout(Some(DEADLINE))?;
    let answering = server.try_clone()?;
    let answers = std::thread::spawn(move || answer_questions(&answering));
    let script = format!(
        "cat /etc/resolv.conf; nslookup -type=a made.example; nslookup -type=a made.example {gateway}"
    );
    let output = connected(
        engine,
        &["--network", "made-names", "--dns", &gateway],
        &script,
    );
    // A datagram without a question ends it.
    std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"", (gateway.as_str(), 53))?;
    ensure!(
        answers.join().is_ok_and(|result| result.is_ok()),
        "the name server failed"
    );
    let output = output?.ok()?.says(&["nameserver 127.0.0.11"])?;
    let found = output.text().matches("192.0.2.99").count();
    ensure!(found == 2, "{found} answers of two: {output}");
    engine.call(&["network", "rm", "made-names"])?.ok()?;
    Ok(())
}

/// Says that every name has the address 192.0.2.99 (RFC 1035, 4.1).
fn answer_questions(socket: &std::net::UdpSocket) -> Result<()> {
    let mut message = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut message)?;
        if length < 12 {
            return Ok(());
        }
        // The question alone: its name ends with an empty label, then come type and class.
        let name = message[12..length].iter().position(|byte| *byte == 0);
        let end = 12 + name.context("a question without an end")? + 5;
        let mut answer = message[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 99]);
        socket.send_to(&answer, from)?;
    }
}

fn of_another_container(engine: &Engine) -> Result<()> {
    serve(engine, "made-owner", &[], WEB)?;
    let output = connected(
        engine,
        &["--network", "container:made-owner"],
        "ip -4 addr show dev eth0; timeout 5 wget -qO- http://127.0.0.1/",
    )?;
    output.ok()?.says(&["inet ", "hello from made-owner"])?;
    engine.remove(&["made-owner"])
}

fn large_transfer(engine: &Engine) -> Result<()> {
    let script = "dd if=/dev/zero bs=1M count=4 2>/dev/null | tr '\\0' x >/tmp/big; md5sum /tmp/big; echo ready; exec httpd -f -p 80 -h /tmp";
    serve(engine, "made-big", &[], script)?;
    let sum = engine.call(&["logs", "made-big"])?.ok()?.text();
    let sum = sum.split_whitespace().next().unwrap_or("none").to_owned();
    let url = format!("http://{}/big", address(engine, "made-big")?);
    connected(
        engine,
        &[],
        &format!(
            "({}) | md5sum",
            get(&url).replace("timeout 5", "timeout 50")
        ),
    )?
    .ok()?
    .says(&[&sum])?;
    engine.remove(&["made-big"])
}

fn datagrams(engine: &Engine) -> Result<()> {
    serve(engine, "made-ping", &[], "echo ready; sleep 1000")?;
    let to = address(engine, "made-ping")?;
    // Larger than the MTU, too: fragments.
    connected(
        engine,
        &["--cap-add", "NET_RAW"],
        &format!("ping -c 2 -w 20 {to} && ping -c 2 -w 20 -s 4000 {to}"),
    )?
    .ok()?
    .says(&["0% packet loss"])?;
    engine.remove(&["made-ping"])
}

fn several_networks(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-one"])?.ok()?;
    engine.call(&["network", "create", "made-two"])?.ok()?;
    engine
        .call(&[
            "create",
            "--name",
            "made-both",
            "--network",
            "made-one",
            IMAGE,
            "sh",
            "-c",
            "ls /sys/class/net; ip route; sleep 1000",
        ])?
        .ok()?;
    engine
        .call(&["network", "connect", "made-two", "made-both"])?
        .ok()?;
    engine.call(&["start", "made-both"])?.ok()?;
    engine.wait_for_log("made-both", "eth1")?;
    engine.remove(&["made-both"])?;
    engine.call(&["network", "rm", "made-one"])?.ok()?;
    engine.call(&["network", "rm", "made-two"])?.ok()?;
    Ok(())
}

fn connect_later(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-first"])?.ok()?;
    engine.call(&["network", "create", "made-later"])?.ok()?;
    serve(engine, "made-server", &["--network", "made-later"], WEB)?;
    serve(
        engine,
        "made-client",
        &["--network", "made-first"],
        "echo ready; sleep 1000",
    )?;
    engine
        .call(&["network", "connect", "made-later", "made-client"])?
        .ok()?;
    // It comes while the container runs.
    engine.exec("made-client", "i=0; until [ -e /sys/class/net/eth1 ] || [ $i = 100 ]; do i=$((i+1)); sleep 0.1; done; ip -4 addr show dev eth1")?
        .ok()?.says(&["inet "])?;
    let url = engine.field(
        "made-server",
        "{{(index .NetworkSettings.Networks \"made-later\").IPAddress}}",
    )?;
    engine
        .exec("made-client", &get(&format!("http://{url}/")))?
        .ok()?
        .says(&["hello from made-server"])?;
    engine
        .call(&["network", "disconnect", "made-later", "made-client"])?
        .ok()?;
    engine.exec("made-client", "i=0; while [ -e /sys/class/net/eth1 ] && [ $i != 100 ]; do i=$((i+1)); sleep 0.1; done; ls /sys/class/net | wc -l")?
        .ok()?.says(&["2\n"])?;
    engine.remove(&["made-client", "made-server"])?;
    engine.call(&["network", "rm", "made-first"])?.ok()?;
    engine.call(&["network", "rm", "made-later"])?.ok()?;
    Ok(())
}

fn addresses_of_ones_own(engine: &Engine) -> Result<()> {
    let create = [
        "network",
        "create",
        "--subnet",
        "10.99.0.0/24",
        "--ipv6",
        "--subnet",
        "fd00:99::/64",
        "made-own",
    ];
    engine.call(&create)?.ok()?;
    let script = "ip addr show dev eth0; ping -c1 -w10 10.99.0.1 >/dev/null && echo v4; ping -6 -c1 -w10 fd00:99::1 >/dev/null && echo v6";
    connected(
        engine,
        &[
            "--network",
            "made-own",
            "--ip",
            "10.99.0.77",
            "--cap-add",
            "NET_RAW",
        ],
        script,
    )?
    .ok()?
    .says(&["10.99.0.77/24", "fd00:99::", "v4", "v6"])?;
    engine.call(&["network", "rm", "made-own"])?.ok()?;
    Ok(())
}

fn host_is_refused(engine: &Engine) -> Result<()> {
    let why = engine
        .call(&["run", "--rm", "--network", "host", IMAGE, "true"])?
        .fails()?;
    ensure!(why.contains("network") && why.contains("host"), "{why}");
    Ok(())
}
