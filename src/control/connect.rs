//! How to use an attached volume: the commands to show for it.
//!
//! Owns: command lines of NBD clients for a URI.
//! Does not own: which URIs there are.

use crate::node::service::Attachment;

/// Commands that use an attachment, each with what it is for.
pub fn commands(attachment: &Attachment) -> Vec<(&'static str, String)> {
    let Some(uri) = attachment.uris.first() else { return Vec::new() };
    let quoted = quote(uri);
    let mut commands = vec![
        ("look at it", format!("nbdinfo {quoted}")),
        ("copy it out", format!("nbdcopy {quoted} {}.raw", attachment.volume)),
        ("ask qemu-img", format!("qemu-img info {quoted}")),
        ("boot a VM from it", format!("qemu-system-x86_64 -m 2G -drive {}", quote(&drive(uri)))),
    ];
    if let Some(client) = attachment.uris.iter().find_map(|uri| nbd_client(uri)) {
        commands.push(("make it /dev/nbd0", client));
    }
    commands
}

fn drive(uri: &str) -> String {
    // A comma ends an option of qemu; doubled it does not.
    format!("file={},format=raw,if=virtio", uri.replace(',', ",,"))
}

fn nbd_client(uri: &str) -> Option<String> {
    if let Some(rest) = uri.strip_prefix("nbd://") {
        let (authority, name) = rest.split_once('/')?;
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port),
            _ => (authority, "10809"),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        return Some(format!("sudo nbd-client {} {port} /dev/nbd0 -name {}", quote(host), quote(name)));
    }
    let (name, socket) = uri.strip_prefix("nbd+unix:///")?.split_once("?socket=")?;
    Some(format!("sudo nbd-client -unix {} /dev/nbd0 -name {}", quote(socket), quote(name)))
}

/// As one word of a shell.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:._-+@%=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(uris: &[&str]) -> Vec<String> {
        let attachment = Attachment {
            volume: "vm-7".into(),
            uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
            read_only: false,
            size_bytes: 512,
        };
        commands(&attachment).into_iter().map(|(_, command)| command).collect()
    }

    #[test]
    fn every_client_gets_its_own_spelling() {
        let tcp = lines(&["nbd://127.0.0.1:10809/vm-7"]);
        assert_eq!(tcp[0], "nbdinfo nbd://127.0.0.1:10809/vm-7");
        assert_eq!(tcp[4], "sudo nbd-client 127.0.0.1 10809 /dev/nbd0 -name vm-7");
        assert_eq!(
            lines(&["nbd://[::1]/vm-7"])[4],
            "sudo nbd-client '::1' 10809 /dev/nbd0 -name vm-7".replace('\'', "")
        );
        let unix = lines(&["nbd+unix:///vm-7?socket=/run/a,b.sock"]);
        assert_eq!(unix[0], "nbdinfo 'nbd+unix:///vm-7?socket=/run/a,b.sock'");
        assert!(unix[3].contains("file=nbd+unix:///vm-7?socket=/run/a,,b.sock,format=raw"));
        assert_eq!(unix[4], "sudo nbd-client -unix /run/a,b.sock /dev/nbd0 -name vm-7");
        assert_eq!(quote("a'b"), "'a'\\''b'");
        assert!(lines(&[]).is_empty());
    }
}
